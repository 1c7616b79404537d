"""Checkpoints in Hugging Face's fp8: those in blocks as transformers itself quantizes, and as compressed-tensors dequantizes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from services.engine.quant.matrix import FLOAT
from tests.engine.quant.readers.checkpoints import (
    DOWN,
    Q,
    assert_refused,
    check_model,
    corrupt,
    dequantized,
    matrices,
    opened,
    with_last,
    write,
)

E8M0 = torch.float8_e8m0fnu
SPARED = "model.layers.1.self_attn.o_proj"


def in_blocks(folder: Path, *, scale_fmt: str = "float", block: tuple[int, int] = (128, 128)) -> dict[str, Tensor]:
    """Writes the model as transformers quantizes it, one matrix spared, and says what compressed-tensors makes of it."""
    config = FineGrainedFP8Config(
        weight_block_size=block, scale_fmt=scale_fmt, modules_to_not_convert=["lm_head", SPARED]
    )
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    content: dict[str, Tensor] = {}
    for name, weight in matrices().items():
        content |= {f"{name}.weight": weight} if name == SPARED else quantize.convert({f"{name}.weight": weight})
    write(folder, content, config.to_dict())
    targets = [name for name in matrices() if f"{name}.weight_scale_inv" in content]
    found = FP8BlockDequantizer(targets=targets, weight_block_size=block, dtype=torch.float32).process(content)
    return {name.removesuffix(".weight"): each.float() for name, each in found.items()}


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_blocks_are_those_of_the_packages(scale_fmt: str, tmp_path: Path) -> None:
    """Scales in floats or in powers of two; a spared matrix is as it is."""
    oracle = in_blocks(tmp_path, scale_fmt=scale_fmt)
    with opened(tmp_path) as checkpoint:
        for name in matrices():
            if name != SPARED:
                torch.testing.assert_close(dequantized(checkpoint, name), oracle[name], rtol=1e-6, atol=0)
            assert checkpoint.format(name).name == ("none" if name == SPARED else "fp8-block")
    check_model(tmp_path, oracle, most=0.1)


def test_a_matrix_that_does_not_fall_into_blocks_is_as_it_is(tmp_path: Path) -> None:
    """transformers leaves it so, and says nothing of it."""
    oracle = in_blocks(tmp_path, block=(128, 512))
    with opened(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.matrix(Q, 256, 256), matrices()[Q])
        assert not torch.equal(dequantized(checkpoint, DOWN), matrices()[DOWN])
    check_model(tmp_path, oracle, most=1e-5)


def test_blocks_of_another_size_are_unpacked(tmp_path: Path) -> None:
    """No format has scales for them."""
    oracle = in_blocks(tmp_path, block=(64, 32))
    with opened(tmp_path) as checkpoint:
        assert checkpoint.format(Q).name == "none"
    check_model(tmp_path, oracle, most=1e-5)


@pytest.mark.parametrize("kind", ["number", "tensor", "square", "row", "column"])
def test_scales_may_be_of_the_matrix_or_of_its_rows(kind: str, tmp_path: Path) -> None:
    """In the shapes that they are written in; constructed here, by what the format says of itself."""
    content, oracle = {}, {}
    for name, weight in matrices().items():
        is_one = kind in ("number", "tensor", "square")
        scales = (weight.abs().amax() if is_one else weight.abs().amax(1, keepdim=True)) / 448
        values = (weight / scales).to(FLOAT)
        oracle[name] = values.float() * scales
        shape = {"number": (), "tensor": (1,), "square": (1, 1), "row": (-1,), "column": (-1, 1)}[kind]
        content |= {
            f"{name}.weight": values,
            f"{name}.weight_scale": scales.reshape(shape),
            f"{name}.input_scale": torch.ones(1),
        }
    config = {"quant_method": "fp8" if kind != "column" else "fbgemm_fp8", "activation_scheme": "static"}
    write(tmp_path, content, config)
    with opened(tmp_path) as checkpoint:
        for name, expected in oracle.items():
            torch.testing.assert_close(dequantized(checkpoint, name), expected, rtol=1e-6, atol=0)
            assert checkpoint.format(name).name == ("fp8-tensor" if is_one else "fp8")
    check_model(tmp_path, oracle, most=0.1)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{Q}.weight_scale_inv", lambda each: None, r"layers\.0\.self_attn\.q_proj\.weight holds float8_e4m3fn, without scales"),
        (f"{DOWN}.weight_scale_inv", lambda each: each.t(), r"down_proj\.weight_scale_inv has shape \[4, 2\], but the config makes it \[2, 4\]"),
        (f"{Q}.weight", lambda each: each.float(), r"q_proj\.weight holds float32, but the config makes it float8_e4m3fn"),
        (f"{Q}.weight", lambda each: each[:, :9], r"q_proj\.weight has shape \[256, 9\]"),
        (f"{Q}.weight", lambda each: with_last(each, torch.nan), r"the tensor .*q_proj\.weight holds values that are not finite numbers"),
        (f"{DOWN}.weight", lambda each: with_last(each, -torch.nan), r"down_proj\.weight holds values that are not finite numbers"),
        (f"{Q}.weight_scale_inv", lambda each: with_last(each, torch.inf), r"q_proj\.weight_scale_inv holds values that are not finite"),
        (f"{Q}.weight_scale_inv", lambda each: with_last(each.to(E8M0), torch.nan), r"q_proj\.weight_scale_inv holds values that are not finite"),
    ],
)  # fmt: skip
def test_a_tensor_that_contradicts_the_config_is_named(tensor: str, change: Any, message: str, tmp_path: Path) -> None:
    """Missing, of another shape, mislabelled."""
    in_blocks(tmp_path)
    corrupt(tmp_path, tensor, change)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\], and must be two whole numbers"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; only e4m3"),
    ],
)
def test_a_config_that_cannot_be_read_says_why(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the key."""
    write(tmp_path, {}, {"quant_method": "fp8"} | config)
    assert_refused(tmp_path, message)
