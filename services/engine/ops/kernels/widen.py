"""Rows of a matrix in eight or four bits as what they stand for: all of them, to be multiplied in 16 bits, or some that are looked up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.int4 import PLANE, SPAN, Packed
from services.engine.ops.kernels.overlap import overlapped, wait

_COLUMNS = 1024


def int8(values_OI: Tensor, scales_O: Tensor, *, dtype: torch.dtype) -> Tensor:
    """values * scales, [O, I]."""
    outputs, inputs = values_OI.shape
    out = torch.empty((outputs, inputs), dtype=dtype, device=values_OI.device)
    _launch(values_OI, scales_O, None, out, outputs)
    return out


def int4(matrix: Packed, indices_R: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """The matrix, [O, I], or these rows of it, [R, I]."""
    outputs = len(matrix.weight_OW)
    num_rows = outputs if indices_R is None else len(indices_R)
    out = torch.empty((num_rows, matrix.inputs), dtype=dtype, device=matrix.weight_OW.device)
    _launch(matrix.weight_OW, matrix.terms_TO2, indices_R, out, outputs, group=matrix.group, paired=matrix.paired)
    return out


def _launch(
    weight: Tensor,
    terms: Tensor,
    indices_R: Tensor | None,
    out: Tensor,
    outputs: int,
    *,
    group: int = 0,
    paired: bool = True,
) -> None:
    num_rows, inputs = out.shape
    if num_rows:
        _widen_weights[(num_rows, triton.cdiv(inputs, _COLUMNS))](
            weight, terms, indices_R, out,
            O=outputs, I=inputs, GROUP=group, PAIRED=paired, SPAN=SPAN, PLANE=PLANE, COLUMNS=_COLUMNS, num_warps=4, **overlapped(out),
        )  # fmt: skip


@triton.jit
def _widen_weights(
    weight, terms, indices, out,
    O: tl.constexpr, I: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr, SPAN: tl.constexpr, PLANE: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < I
    wait(OVERLAP)
    line = row if indices is None else tl.load(indices + row).to(tl.int64)
    if GROUP:
        PITCH: tl.constexpr = (I + SPAN - 1) // SPAN * PLANE
        words = tl.load(weight + line * PITCH + column // SPAN * PLANE + column % PLANE, mask=inside, other=0)
        number = (words.to(tl.int32) >> column % SPAN // PLANE * 4 & 15) - 8
        group = column // GROUP
        at = terms + ((group // 2 * O + line) * 2 + group % 2 if PAIRED else (group * O + line) * 2)
        found = number.to(tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if not PAIRED:
            found += tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        found = tl.load(weight + line * I + column, mask=inside, other=0).to(tl.float32) * tl.load(terms + line)
    tl.store(out + row * I + column, found, mask=inside)
