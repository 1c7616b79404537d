"""Products of activations as they are with a matrix in four bits, by torch's own kernel for a CPU.

It lays the values of some neighbouring outputs out in bytes column by column, two outputs a byte. How many outputs, and
which two, depends on the CPU, and is found by laying out a matrix and looking.

Shapes: O outputs, I inputs, G groups of inputs, N rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.linear import plus

GROUPS = (256, 128, 64, 32)
"""So many inputs may share a scale."""


def packed(values_OI: Tensor, scales_OG: Tensor, offsets_OG: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values from -8 to 7 that stand for value * scale + offset, as `linear` wants them for activations in `dtype`; scales and
    offsets are kept in it. Outputs are filled up with such as are never asked for."""
    missing = -values_OI.shape[0] % _layout().outputs
    values_OI = F.pad(values_OI.to(torch.int32) + 8, (0, 0, 0, missing))
    terms_GO2 = F.pad(torch.stack((scales_OG, offsets_OG), dim=2), (0, 0, 0, 0, 0, missing)).transpose(0, 1)
    weight: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values_OI, 1)
    return weight, terms_GO2.to(dtype).contiguous()


def linear(
    x_NI: Tensor,
    weight: Tensor,
    terms_GO2: Tensor,
    *,
    outputs: int,
    bias_O: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias + add, in `dtype`, the weight as `packed` returned it, which has so many outputs. Sums are taken in float32,
    and rounded to the dtype of the scales; then again with what is added. In bfloat16 torch's kernel is fast, in other dtypes slow."""
    x_NI = x_NI.to(terms_GO2.dtype)
    group = x_NI.shape[1] // terms_GO2.shape[0]
    out_NO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x_NI, weight, group, terms_GO2)
    if outputs != out_NO.shape[1]:
        out_NO = out_NO[:, :outputs].contiguous()
    return plus(out_NO, bias_O, add).to(dtype)


def rows(weight: Tensor, terms_GO2: Tensor, indices: Tensor) -> Tensor:
    """These rows of what `packed` returned, [..., I], in float32."""
    layout, num_groups = _layout(), terms_GO2.shape[0]
    inputs = weight.numel() * 2 // terms_GO2.shape[1]
    blocks = weight.view(torch.uint8).view(-1, inputs, layout.outputs // 2)
    flat = indices.flatten()
    places = flat % layout.outputs
    values_NI = blocks[flat // layout.outputs, :, layout.bytes[places]] >> layout.shifts[places][:, None] & 15
    terms_NG2 = terms_GO2[:, flat].transpose(0, 1).float()
    values_NGi = (values_NI.float() - 8).view(len(flat), num_groups, -1)
    rows_NGi = values_NGi * terms_NG2[..., :1] + terms_NG2[..., 1:]
    return rows_NGi.view(*indices.shape, inputs)


class _Layout(NamedTuple):
    """How the kernel lays out a block of outputs."""

    outputs: int
    """Of a block. In it, each column of inputs takes half as many bytes."""
    bytes: Tensor
    """Of those the one that an output is in."""
    shifts: Tensor
    """In which half of it: 0 or 4."""


@cache
def _layout() -> _Layout:
    def found(output: int, outputs: int) -> Tensor:
        """The bytes of two columns that are not 0 where all values of this output are 15, and the others 0."""
        values = torch.zeros(outputs, 2, dtype=torch.int32)
        values[output] = 15
        laid_out: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        return laid_out.view(torch.uint8).flatten()

    with torch.inference_mode(False):
        first, second = found(0, 256).nonzero().flatten().tolist()
        outputs = 2 * (second - first)
        columns = torch.stack([found(output, outputs).view(2, -1)[0] for output in range(outputs)])
        return _Layout(outputs, columns.argmax(1), (columns.amax(1) == 0xF0).to(torch.uint8) * 4)
