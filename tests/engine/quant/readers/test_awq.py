"""AWQ checkpoints: those that AutoAWQ and GPTQModel wrote, as they read them; and such as are packed here by the formula that AutoAWQ publishes (`awq/modules/linear/gemm.py`,
`from_linear`), of which the converter of compressed-tensors says what they mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from tests.engine.quant.readers.checkpoints import (
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

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def packed(numbers: Tensor) -> Tensor:
    """The columns of whole numbers, eight in an int32, in the order of the kernels."""
    words = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(ORDER):
        words |= numbers[:, column::8].long() << 4 * place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def written(folder: Path, *, group: int = 64, zero_point: bool = True) -> dict[str, Tensor]:
    """Writes the model, and says what the converter of compressed-tensors makes of it."""
    content: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(3)
    for name, weight in matrices().items():
        outputs, inputs = weight.shape
        scales = (torch.rand(inputs // group, outputs, generator=draw) * 0.01 + 0.01).half()
        zeros = torch.randint(0, 16, scales.shape, generator=draw) if zero_point else torch.full(scales.shape, 8)
        groups = torch.arange(inputs) // group
        steps = (weight.t() / scales[groups].float() + zeros[groups]).round().clamp(0, 15).int()
        content |= {f"{name}.qweight": packed(steps), f"{name}.scales": scales}
        if zero_point:
            content[f"{name}.qzeros"] = packed(zeros)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm"}
    write(folder, content, config)
    found = AutoAWQConverter(group_size=group, zero_point=zero_point).process(dict(content))
    weights = QuantizationArgs(num_bits=4, symmetric=not zero_point, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    oracle = {}
    for name in matrices():
        state = {key.rpartition(".")[2]: each for key, each in found.items() if key.startswith(f"{name}.")}
        oracle[name] = compressor.decompress(state | {"weight_scale": state["weight_scale"].float()}, scheme)["weight"]
    return oracle


@pytest.mark.parametrize("name", ["awq", "awq_gptqmodel"])
def test_what_the_packages_wrote_is_read_as_they_read_it(name: str) -> None:
    """AutoAWQ, and GPTQModel, which took it over."""
    check_written(name, kept="int4-g32-asym")


@pytest.mark.parametrize("group", [32, 64, 128])
def test_matrices_and_logits_are_those_of_the_converter(group: int, tmp_path: Path) -> None:
    """In the order of the kernels, with zero points."""
    oracle = written(tmp_path, group=group)
    with opened(tmp_path) as checkpoint:
        for name, expected in oracle.items():
            torch.testing.assert_close(dequantized(checkpoint, name), expected, rtol=1e-6, atol=1e-8)
            assert checkpoint.format(name).name == f"int4-g{group}-asym"
    check_model(tmp_path, oracle, most=1e-3)


def test_zero_may_be_in_the_middle(tmp_path: Path) -> None:
    """Then there need be no zero points."""
    oracle = written(tmp_path, zero_point=False)
    with opened(tmp_path) as checkpoint:
        for name, expected in oracle.items():
            torch.testing.assert_close(dequantized(checkpoint, name), expected, rtol=1e-6, atol=1e-8)
            assert checkpoint.format(name).name == "int4-g64"
    check_model(tmp_path, oracle, most=1e-3)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{Q}.qzeros", lambda each: None, r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.qzeros"),
        (f"{Q}.scales", lambda each: each[1:], r"q_proj\.scales has shape \[3, 256\], but the config makes it \[4, 256\]"),
        (f"{Q}.qweight", lambda each: each.long(), r"q_proj\.qweight holds int64, but the config makes it int32"),
    ],
)  # fmt: skip
def test_a_tensor_that_contradicts_the_config_is_named(tensor: str, change: Any, message: str, tmp_path: Path) -> None:
    """Missing, of another shape, mislabelled."""
    written(tmp_path)
    corrupt(tmp_path, tensor, change)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 8}, "bits is 8, and must be one of 4"),
        ({"bits": 4, "version": "gemv"}, "version is 'gemv'; of awq only"),
    ],
)
def test_a_config_that_cannot_be_read_says_why(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the key and what there is."""
    write(tmp_path, {}, {"quant_method": "awq"} | config)
    assert_refused(tmp_path, message)
