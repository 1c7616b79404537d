"""GPTQ checkpoints: those that GPTQModel wrote, as it reads them; and such as are packed here, number by number, by the formulas that it and AutoGPTQ publish
(`auto_gptq/nn_modules/qlinear/qlinear_cuda.py`, `pack`), for what those do not show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.shard import Shard
from tests.engine.quant.readers.checkpoints import (
    DOWN,
    Q,
    assert_refused,
    check_model,
    check_written,
    corrupt,
    dequantized,
    matrices,
    opened,
    write,
)


def packed(numbers: Tensor, bits: int) -> Tensor:
    """The rows of whole numbers, so many in an int32, the first in the lowest bits."""
    each = 32 // bits
    words = torch.zeros(len(numbers) // each, numbers.shape[1], dtype=torch.int64)
    for place in range(each):
        words |= numbers[place::each].long() << bits * place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def written(
    folder: Path, *, bits: int = 4, group: int = 32, sym: bool = True, desc_act: bool = False, version: str = "gptq", zero: int | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """Writes the model, and says what its matrices are by the definition: (number - zero) * scale."""
    content, oracle, middle = {}, {}, 2 ** (bits - 1)
    draw = torch.Generator().manual_seed(3)
    for name, weight in matrices().items():
        outputs, inputs = weight.shape
        size = inputs if group == -1 else group
        order = (
            torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
            if desc_act
            else torch.arange(inputs)
        )
        g_idx = torch.empty(inputs, dtype=torch.int32)
        g_idx[order] = torch.arange(inputs, dtype=torch.int32) // size
        scales = (torch.rand(inputs // size, outputs, generator=draw) * 0.01 + 0.01).half() * (2 ** (4 - bits))
        zeros = torch.full(scales.shape, middle) if sym else torch.randint(0, 2 * middle, scales.shape, generator=draw)
        if zero is not None:
            zeros[:] = zero
        steps = (weight.t() / scales[g_idx.long()].float() + zeros[g_idx.long()]).round().clamp(0, 2 * middle - 1).int()
        oracle[name] = ((steps - zeros[g_idx.long()]) * scales[g_idx.long()].float()).t().contiguous()
        each_place = sum(1 << place for place in range(0, 32, bits))
        content |= {
            f"{name}.qweight": packed(steps, bits),
            f"{name}.qzeros": packed(zeros.t(), bits).t().contiguous() - (version == "gptq") * each_place,
            f"{name}.scales": scales,
            f"{name}.g_idx": g_idx,
            f"{name}.bias": torch.zeros(outputs, dtype=torch.float16),
        }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": version,
    }
    write(folder, content, config)
    return oracle


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "int4-g32"),
    "128": ({"group": 128}, "int4-g128"),
    "all inputs": ({"group": -1}, "int4-g128"),
    "zero points": ({"sym": False, "group": 64}, "int4-g64-asym"),
    "sorted": ({"desc_act": True}, "int4-g32"),
    "sorted with zero points": ({"desc_act": True, "sym": False}, "int4-g32-asym"),
    "version 2": ({"version": "gptq_v2", "sym": False}, "int4-g32-asym"),
    "zero points that borrow": ({"sym": False, "zero": 0}, "int4-g32-asym"),
    "small groups": ({"group": 16}, "none"),
    "8 bits": ({"bits": 8, "group": -1}, "int8-weight"),
    "8 bits in groups": ({"bits": 8, "sym": False, "desc_act": True}, "none"),
}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("gptq", "int4-g32"),
        ("gptq_sorted", "int4-g32-asym"),
        ("gptq_v2", "int4-g64-asym"),
        ("gptq_8_bits", "int8-weight"),
    ],
)
def test_what_gptqmodel_wrote_is_read_as_it_reads_it(name: str, kept: str) -> None:
    """In both versions of the format, symmetric and not, inputs sorted and not."""
    check_written(name, kept=kept)


@pytest.mark.parametrize("name", CASES)
def test_matrices_and_logits_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    """Of each kind; a bias of zeros is no bias."""
    changes, kept = CASES[name]
    oracle = written(tmp_path, **changes)
    with opened(tmp_path) as checkpoint:
        for matrix, expected in oracle.items():
            torch.testing.assert_close(dequantized(checkpoint, matrix), expected, rtol=1e-6, atol=1e-8)
            assert checkpoint.format(matrix).name == kept
    check_model(tmp_path, oracle, most=1e-3)


def test_sorted_inputs_are_not_split_over_ranks(tmp_path: Path) -> None:
    """Outputs are."""
    oracle = written(tmp_path, desc_act=True)
    shard = Shard(1, 2)
    with opened(tmp_path, shard=shard) as checkpoint:
        found = checkpoint.matrix(Q, shard.part(256, "outputs"), 256)
        torch.testing.assert_close(found.dequant(), oracle[Q][128:])
        with pytest.raises(
            ConfigurationError, match=r"down_proj has its inputs sorted \(act-order\), which cannot be split"
        ):
            checkpoint.matrix(DOWN, 256, shard.part(512, "inputs"))


def test_a_bias_that_nobody_takes_must_be_zero(tmp_path: Path) -> None:
    """Else it is one that the model has no place for."""
    written(tmp_path)
    corrupt(tmp_path, f"{Q}.bias", lambda each: each.index_fill(0, torch.tensor(3), 0.5))
    with pytest.raises(ConfigurationError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{Q}.scales", lambda each: None, r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.scales"),
        (f"{Q}.g_idx", lambda each: None, r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.g_idx"),
        (f"{Q}.g_idx", lambda each: each * 0, r"q_proj\.g_idx does not put 32 inputs into each group"),
        (f"{Q}.qzeros", lambda each: each + 1, r"q_proj\.qzeros holds zero points off the middle"),
        (f"{Q}.qweight", lambda each: each[1:], r"q_proj\.qweight has shape \[31, 256\], but the config makes it \[32, 256\]"),
        (f"{Q}.qweight", lambda each: each.float(), r"q_proj\.qweight holds float32, but the config makes it int32"),
    ],
)  # fmt: skip
def test_a_tensor_that_contradicts_the_config_is_named(tensor: str, change: Any, message: str, tmp_path: Path) -> None:
    """Missing, of another shape, mislabelled."""
    written(tmp_path, desc_act=True)
    corrupt(tmp_path, tensor, change)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 3}, "bits is 3, and must be one of 4, 8"),
        ({"bits": 4, "group_size": 48}, "group_size is 48"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; there are gptq, gptq_v2"),
        (
            {"bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
            r"layers that have bits of their own \(\+:\.\*down\.\*\)",
        ),
    ],
)
def test_a_config_that_cannot_be_read_says_why(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the key and what there is."""
    write(tmp_path, {}, {"quant_method": "gptq"} | config)
    assert_refused(tmp_path, message)
