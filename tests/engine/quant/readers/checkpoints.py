"""A small Llama whose matrices tests replace by such in few bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.quality.sizes import bytes_of
from services.engine.shard import ALONE, Shard
from services.engine.weights import Checkpoint, open_checkpoint
from tests.engine.batches import Bench

HIDDEN, VOCAB, LAYERS = 256, 96, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPT = [(7 * n * n + 3) % VOCAB for n in range(40)]
Q, O, DOWN = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")


def matrices() -> dict[str, Tensor]:
    """The matrices of the layers, by name."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (256 if name in "qo" else 128, 256) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (512, 256) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj": (256, 512)}
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) * 0.05 + 0.002 for name, shape in shapes.items()}


def others() -> dict[str, Tensor]:
    """What is not in few bits: embedding, head and norms."""
    draw = torch.Generator().manual_seed(1)
    names = [
        f"model.layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in ("input", "post_attention")
    ]
    tables = {
        f"{name}.weight": torch.randn(VOCAB, HIDDEN, generator=draw) * 0.05
        for name in ("model.embed_tokens", "lm_head")
    }
    return tables | {f"{name}.weight": torch.ones(HIDDEN) for name in (*names, "model.norm")}


def write(folder: Path, content: Mapping[str, Tensor], quantization_config: Mapping[str, Any] | None = None) -> Path:
    """A model's folder with these tensors and the others."""
    folder.mkdir(exist_ok=True, parents=True)
    more = {} if quantization_config is None else {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(CONFIG | more, default=str))
    save_file(
        {name: each.contiguous() for name, each in (others() | dict(content)).items()}, folder / "model.safetensors"
    )
    return folder


def assert_refused(folder: Path, message: str) -> None:
    """Loading what is there raises ConfigurationError with this message, a regular expression."""
    with pytest.raises(ConfigurationError, match=message):
        load(folder)


def corrupt(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Changes a tensor of the folder's file; None takes it out."""
    content = load_file(folder / "model.safetensors")
    if (changed := change(content.pop(name))) is not None:
        content[name] = changed.contiguous()
    save_file(content, folder / "model.safetensors")


def with_last(values: Tensor, value: float) -> Tensor:
    """The same, but for the last of them."""
    values = values.clone()
    values.view(-1)[-1] = value
    return values


def weights_of(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as tensors of a checkpoint."""
    return {f"{name}.weight": each.float() for name, each in plain.items()}


def opened(folder: Path, *, shard: Shard = ALONE) -> Any:
    """The checkpoint, as loading a model opens it."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return open_checkpoint(
        folder, dtype=torch.float32, device=torch.device("cpu"), shard=shard, quantization_config=config
    )


def dequantized(checkpoint: Checkpoint, name: str) -> Tensor:
    """The matrix of this name as we read it."""
    matrix = checkpoint.matrix(name, *matrices()[name].shape)
    assert not isinstance(matrix, Tensor), f"{name} came as it is"
    return matrix.dequant()


def logits(folder: Path, **more: Any) -> Tensor:
    return Bench(load(folder, dtype=torch.float32, **more)).logits(PROMPT)


def size(folder: Path, **more: Any) -> int:
    """Bytes of the model's weights."""
    return bytes_of(load(folder, **more))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_model(folder: Path, oracle: Mapping[str, Tensor], *, most: float) -> None:
    """Unpacked, logits are those of the matrices in `oracle`; as they are kept, they are off by `most` at the most."""
    expected = logits(write(folder / "plain", weights_of(oracle)))
    torch.testing.assert_close(logits(folder, quantization="*=none"), expected, rtol=0, atol=1e-4)
    assert relative_error(logits(folder), expected) < most


WRITTEN = Path(__file__).parent / "written"
"""Checkpoints that the packages wrote which define their formats, each with what its matrices are to them; `make.py` there says how."""


def check_written(name: str, *, kept: str) -> None:
    """We read a checkpoint of `WRITTEN` as its package does, bit for bit, and keep its matrices in this format; and nothing of it is left over."""
    folder = WRITTEN / name
    expected = json.loads((folder / "dequantized.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    sizes = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    assert len(expected) == 7 and config["hidden_size"] == 64
    with opened(folder) as checkpoint:
        for matrix, digest in expected.items():
            found = checkpoint.matrix(matrix, *sizes.get(matrix.rpartition(".")[2], (64, 64)))
            assert not isinstance(found, Tensor)
            assert sha256(found.dequant().half().numpy().tobytes()).hexdigest() == digest, matrix
            assert checkpoint.format(matrix).name == kept
    unpacked = logits(folder, quantization="*=none")
    assert relative_error(logits(folder), unpacked) < 1e-3
