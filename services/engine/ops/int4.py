"""Products of activations as they are with a matrix in four bits.

A GPU widens the matrix as it multiplies it (`kernels.int4`), or, where rows are many, once for all of them. On a CPU it is torch's
own kernel. That lays the values of some neighbouring outputs out in bytes column by column, two outputs a byte. How many outputs, and
which two, depends on the CPU, and is found by laying out a matrix and looking.

Shapes: O outputs, I inputs, G groups of inputs, N rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.forms import Activations, Unnormed, single_row
from services.engine.ops.linear import in_dtype, plus

MOST_ROWS = 256
"""Of x on a GPU. With more a matrix that is widened once for all of them is multiplied sooner (not measured yet)."""

Matrix = tuple[Any, ...]
"""What `packed` returned, the values first."""


def groups_for(values_OI: Tensor) -> tuple[int, ...]:
    """So many inputs may share a scale where these values are."""
    return (128, 64, 32) if values_OI.is_cuda else (256, 128, 64, 32)


def packed(values_OI: Tensor, scales_OG: Tensor, offsets_OG: Tensor | None, *, dtype: torch.dtype) -> Matrix:
    """Values from -8 to 7 that stand for value * scale + offset, as `linear` wants them for activations in `dtype`; scales and
    offsets are kept in it."""
    if values_OI.is_cuda:
        from services.engine.ops.kernels import int4

        return int4.packed(values_OI, scales_OG, offsets_OG, dtype=dtype)
    if offsets_OG is None:
        offsets_OG = torch.zeros_like(scales_OG)
    # Outputs are filled up with such as are never asked for.
    outputs = len(values_OI)
    missing = -outputs % _layout().outputs
    values_OI = F.pad(values_OI.to(torch.int32) + 8, (0, 0, 0, missing))
    terms_GO2 = F.pad(torch.stack((scales_OG, offsets_OG), dim=2), (0, 0, 0, 0, 0, missing)).transpose(0, 1)
    weight: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values_OI, 1)
    return weight, terms_GO2.to(dtype).contiguous(), outputs


def linear(x: Tensor, matrix: Matrix, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias + add, in `dtype`. Sums are taken in float32 and rounded once; on a CPU to the dtype of the scales, and then
    again with what is added. In bfloat16 a CPU's kernel is fast, in other dtypes slow."""
    if matrix[0].is_cuda:
        return _on_gpu(x, matrix, bias_O=bias_O, add=add, dtype=dtype)
    weight, terms_GO2, outputs = matrix
    x = x.to(terms_GO2.dtype)
    group = x.shape[1] // terms_GO2.shape[0]
    out_NO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, weight, group, terms_GO2)
    if outputs != out_NO.shape[1]:
        out_NO = out_NO[:, :outputs].contiguous()
    return plus(out_NO, bias_O, add).to(dtype)


def takes_row(x: Activations, matrix: Matrix) -> TypeGuard[Tensor | Unnormed]:
    """Whether `row_linear` multiplies these activations: a single row on a GPU."""
    row = single_row(x)
    if row is None:
        return False
    from services.engine.ops.kernels import gemv4, int4

    return gemv4.is_supported(int4.Packed(*matrix), row.dtype)


def row_linear(
    x: Tensor | Unnormed,
    matrix: Matrix,
    *,
    bias_O: Tensor | None,
    add: Tensor | None = None,
    dtype: torch.dtype,
    gated: bool = False,
) -> Tensor:
    """x @ weight.T + bias + add, [1, O], in `dtype`; gated, silu of the first half of that times the second. Weights are not rounded to 16 bits
    there."""
    from services.engine.ops.kernels import gemv4, int4

    return gemv4.gemv(x, int4.Packed(*matrix), bias_O=bias_O, add=add, dtype=dtype, gated=gated)


def rows(matrix: Matrix, indices: Tensor) -> Tensor:
    """These rows of the matrix, [..., I], in float32."""
    if matrix[0].is_cuda:
        from services.engine.ops.kernels import int4, widen

        found = widen.int4(int4.Packed(*matrix), indices.flatten(), dtype=torch.float32)
        return found.view(*indices.shape, -1)
    weight, terms_GO2, _ = matrix
    layout, num_groups = _layout(), terms_GO2.shape[0]
    inputs = weight.numel() * 2 // terms_GO2.shape[1]
    blocks = weight.view(torch.uint8).view(-1, inputs, layout.outputs // 2)
    flat = indices.flatten()
    places = flat % layout.outputs
    values_NI = blocks[flat // layout.outputs, :, layout.bytes[places]] >> layout.shifts[places][:, None] & 15
    terms_NG2 = terms_GO2[:, flat].transpose(0, 1).float()
    values_NGi = (values_NI.float() - 8).view(len(flat), num_groups, -1)
    rows_NGi = values_NGi * terms_NG2[..., :1] + terms_NG2[..., 1:]
    found_NI: Tensor = rows_NGi.view(*indices.shape, inputs)
    return found_NI


def _on_gpu(x: Tensor, matrix: Matrix, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype) -> Tensor:
    from services.engine.ops.kernels import int4, widen

    gpu = int4.Packed(*matrix)
    if len(x) <= MOST_ROWS and x.dtype == gpu.terms_TO2.dtype and x.itemsize == 2:
        return int4.matmul(x, gpu, bias_O=bias_O, add=add, dtype=dtype)
    return in_dtype(x, widen.int4(gpu, dtype=x.dtype), bias_O=bias_O, add=add, dtype=dtype)


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
