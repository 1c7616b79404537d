"""Matrices from weights in few bits, fused and split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.layers.embedding import Embedding
from services.engine.layers.linear import Linear
from services.engine.quant import Weight
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest
from services.engine.quant.rules import Rules
from services.engine.shard import ALONE, Part, Shard
from services.engine.weights import Dummy

CPU = torch.device("cpu")
INPUTS = 192


class InFewBits(Dummy):
    """As a reader of a quantized checkpoint: every matrix is rounded by one scheme, and cut."""

    def __init__(self, scheme: Scheme, rules: str, shard: Shard = ALONE) -> None:
        super().__init__(dtype=torch.float32, device=CPU, shard=shard, rules=Rules(rules))
        self._scheme = scheme

    def whole(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        return nearest(super().take(f"{name}.weight", outputs, inputs), self._scheme)

    def matrix(self, name: str, outputs: int | Part, inputs: int | Part) -> Weight:
        sizes = [size.of if isinstance(size, Part) else size for size in (outputs, inputs)]
        cuts = (
            slice(size.start, size.start + size.count) if isinstance(size, Part) else slice(None)
            for size in (outputs, inputs)
        )
        return self.whole(name, *sizes).part(*cuts)


SCHEMES = {
    "int8-weight": Scheme(),
    "int4-g32": Scheme(4, tile=(1, 64)),
    "int4-g64-asym": Scheme(4, tile=(1, 32), symmetric=False),
    "int4-g128": Scheme(3, tile=(1, None)),
    "none": Scheme(is_float=True, tile=(128, 128)),
}


def noise(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("format", SCHEMES)
def test_matrices_in_few_bits_are_kept_as_one(format: str) -> None:
    """Outputs side by side, without a rounding more, whatever the format's own scheme is."""
    weights = InFewBits(SCHEMES[format], f"*={format}")
    linear = Linear.load(weights, "q", "k", "v", inputs=INPUTS, outputs=(96, 40, 40))
    x = noise(3, INPUTS)
    expected = torch.cat(
        [x @ weights.whole(name, size, INPUTS).dequant().T for name, size in zip("qkv", (96, 40, 40), strict=True)], 1
    )
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", SCHEMES)
def test_two_shards_add_up_to_the_whole(format: str) -> None:
    """Split along inputs, through the middle of groups, and along outputs."""
    x, parts = noise(3, INPUTS), []
    for rank in range(2):
        weights = InFewBits(SCHEMES[format], f"*={format}", Shard(rank, 2))
        part = Part(rank * INPUTS // 2, INPUTS // 2, INPUTS)
        linear = Linear.load(weights, "o", inputs=part, outputs=(64,))
        parts.append(linear(x[:, part.start : part.start + part.count].contiguous()))
        rows = Linear.load(weights, "g", "u", inputs=INPUTS, outputs=(Part(rank * 48, 48, 96),) * 2)
        expected = [x @ weights.whole(name, 96, INPUTS).dequant()[rank * 48 :][:48].T for name in "gu"]
        torch.testing.assert_close(rows(x), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    expected_whole = x @ weights.whole("o", 64, INPUTS).dequant().T
    torch.testing.assert_close(parts[0] + parts[1], expected_whole, rtol=1e-4, atol=1e-4)


def test_tensors_keep_the_scales_that_each_alone_would_have() -> None:
    """Plain matrices that are kept as one, where a scale holds for more than a row."""

    class Unlike(Dummy):
        def take(self, name: str, *shape: int | Part) -> Tensor:
            return super().take(name, *shape) * (100 if name.startswith("q") else 1)

    weights = Unlike(dtype=torch.float32, device=CPU, rules=Rules("fp8-tensor"))
    linear, x = Linear.load(weights, "q", "k", inputs=64, outputs=(32, 32)), noise(3, 64)
    alone = Linear.load(weights, "k", inputs=64, outputs=(32,))
    torch.testing.assert_close(linear(x)[:, 32:], alone(x), rtol=1e-5, atol=1e-6)


def test_an_error_names_the_matrices() -> None:
    """As the checkpoint does."""
    weights = Dummy(dtype=torch.float32, device=CPU, rules=Rules("int4-g128")).under("model.layers.0.self_attn")
    message = r"quantization: model\.layers\.0\.self_attn\.q_proj, .*k_proj: int4-g128 keeps 128 inputs in a group, and there are 192"
    with pytest.raises(ConfigurationError, match=message):
        Linear.load(weights, "q_proj", "k_proj", inputs=192, outputs=(32, 32))


@pytest.mark.parametrize("format", ["int8", "int8-static", "int8-weight", "int4-g64"])
def test_an_embedding_gives_its_rows(format: str) -> None:
    """Of its table in few bits."""
    weights = Dummy(dtype=torch.float32, device=CPU, rules=Rules(f"*={format}"))
    embedding = Embedding(weights, "model.embed_tokens", vocab_size=97, size=INPUTS)
    plain = weights.take("model.embed_tokens.weight", 97, INPUTS)
    scheme = Scheme(4, tile=(1, 64)) if format == "int4-g64" else Scheme()
    ids = torch.tensor([0, 5, 96])
    torch.testing.assert_close(embedding(ids), nearest(plain, scheme).dequant()[ids])


def test_an_embedding_in_fp8_is_refused() -> None:
    """By name, and with what can be."""
    weights = Dummy(dtype=torch.float32, device=CPU, rules=Rules("*=fp8"))
    with pytest.raises(ConfigurationError, match=r"model\.embed_tokens cannot be kept in fp8.*int8-weight or int4-g64"):
        Embedding(weights, "model.embed_tokens", vocab_size=97, size=INPUTS)
