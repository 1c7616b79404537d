"""Rows of a matrix in eight or four bits as what they stand for: all of them, to be multiplied in 16 bits, or some that are looked up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.int4 import Packed, span_of
from services.engine.ops.kernels.overlap import overlapped, wait

_COLUMNS = 1024


def int8(values_OI: Tensor, scales_O: Tensor, *, dtype: torch.dtype) -> Tensor:
    """values * scales, [O, I]."""
    outputs, inputs = values_OI.shape
    out = torch.empty((outputs, inputs), dtype=dtype, device=values_OI.device)
    _launch(values_OI, scales_O, None, None, out, outputs, group=0, span=1)
    return out


def int4(matrix: Packed, indices_R: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """The matrix, [O, I], or these rows of it, [R, I]."""
    outputs = matrix.scales_GO.shape[1]
    num_rows = outputs if indices_R is None else len(indices_R)
    out = torch.empty((num_rows, matrix.inputs), dtype=dtype, device=matrix.scales_GO.device)
    _launch(
        matrix.weight_OB, matrix.scales_GO, matrix.offsets_GO, indices_R, out, outputs,
        group=matrix.group, span=span_of(matrix.group),
    )  # fmt: skip
    return out


def _launch(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    indices_R: Tensor | None,
    out: Tensor,
    outputs: int,
    *,
    group: int,
    span: int,
) -> None:
    num_rows, inputs = out.shape
    if num_rows:
        _widen[(num_rows, triton.cdiv(inputs, _COLUMNS))](
            weight, scales, offsets, indices_R, out,
            O=outputs, I=inputs, GROUP=group, SPAN=span, COLUMNS=_COLUMNS, num_warps=4, **overlapped(out),
        )  # fmt: skip


@triton.jit
def _widen(
    weight, scales, offsets, indices, out,
    O: tl.constexpr, I: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < I
    wait(OVERLAP)
    line = row if indices is None else tl.load(indices + row).to(tl.int64)
    if GROUP:
        HALF: tl.constexpr = SPAN // 2
        PITCH: tl.constexpr = (I + SPAN - 1) // SPAN * HALF
        both = tl.load(weight + line * PITCH + column // SPAN * HALF + column % HALF, mask=inside, other=0)
        four = tl.where(column % SPAN < HALF, both << 4, both) >> 4
        group = column // GROUP
        found = four.to(tl.float32) * tl.load(scales + group * O + line, mask=inside, other=0.0).to(tl.float32)
        if offsets is not None:
            found += tl.load(offsets + group * O + line, mask=inside, other=0.0).to(tl.float32)
    else:
        found = tl.load(weight + line * I + column, mask=inside, other=0).to(tl.float32) * tl.load(scales + line)
    tl.store(out + row * I + column, found, mask=inside)
