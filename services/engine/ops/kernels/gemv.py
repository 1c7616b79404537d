"""One row times a weight matrix: bound by reading the matrix, and by how many of its bytes are on their way at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Unnormed
from services.engine.ops.kernels.overlap import lines_of, overlapped, prefetch, wait

ROWS, COLUMNS, WARPS, STAGES = 4, 1024, 4, 4
"""Of the matrix, what a program takes at a time, and how it runs (measured on an H200). Fewer columns where a row has no
multiple of those."""

EARLY_BYTES = 0
"""Of each row behind its first columns, what a program asks for while the kernel before ends."""


def is_supported(weight_OI: Tensor, *, gated: bool = False) -> bool:
    """Whether the matrix, or gate and up, fall into whole tiles."""
    outputs, inputs = weight_OI.shape
    return weight_OI.itemsize <= 2 and outputs % ROWS == 0 and inputs % _columns(inputs) == 0


def _columns(inputs: int) -> int:
    return next((columns for columns in (COLUMNS, COLUMNS // 2) if inputs % columns == 0), COLUMNS // 4)


def gemv(
    x: Tensor | Unnormed,
    weight_OI: Tensor,
    *,
    scales_O: Tensor | None = None,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    gated: bool = False,
) -> Tensor:
    """x @ weight.T * scales + bias + add, [1, O], in the dtype of x or another one; or, of that, silu of the first half times the
    second. Where x is to be normed, the product is with what the norm gives before that is rounded."""
    x_1I, norm_I, eps = x if isinstance(x, Unnormed) else (x, x, 0.0)
    outputs, inputs = weight_OI.shape
    rows, columns = ROWS, _columns(inputs)
    if gated:
        rows, outputs = rows // 2, outputs // 2
    out = torch.empty((1, outputs), dtype=dtype or x_1I.dtype, device=x_1I.device)
    _gemv[(outputs // rows,)](
        x_1I,
        weight_OI,
        out,
        scales_O,
        x_1I if bias_O is None else bias_O,
        x_1I if add is None else add,
        norm_I,
        eps,
        I=inputs,
        O=outputs,
        ROWS=rows,
        COLUMNS=columns,
        BIAS=bias_O is not None,
        ADD=add is not None,
        NORM=isinstance(x, Unnormed),
        GATED=gated,
        STAGES=STAGES,
        EARLY=lines_of(min(EARLY_BYTES, (inputs - columns) * weight_OI.itemsize)),
        num_warps=WARPS,
        **overlapped(x_1I),
    )
    return out


@triton.jit
def _gemv(
    x,
    weight,
    out,
    scales,
    bias,
    add,
    norm,
    eps,
    I: tl.constexpr,
    O: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = weight + row.to(tl.int64)[:, None] * I + column[None, :]
    first = tl.load(at)  # on its way while the kernel before ends
    if GATED:
        first_up = tl.load(at + O * I)
    if EARLY > 0:
        line = COLUMNS + tl.arange(0, EARLY) * (128 // weight.dtype.element_ty.primitive_bitwidth * 8)
        behind = weight + row.to(tl.int64)[:, None] * I + line[None, :]
        prefetch(behind, OVERLAP)
        if GATED:
            prefetch(behind + O * I, OVERLAP)
    if NORM:
        first_norm = tl.load(norm + column)
    wait(OVERLAP)
    values = tl.load(x + column).to(tl.float32)
    if NORM:
        # The root of the mean square is known at the end, and divides a sum as well as what is added up.
        squares = values * values
        values *= first_norm.to(tl.float32)
    total = first.to(tl.float32) * values[None, :]
    if GATED:
        total_up = first_up.to(tl.float32) * values[None, :]
    for start in tl.range(COLUMNS, I, COLUMNS, num_stages=STAGES):
        values = tl.load(x + start + column).to(tl.float32)
        if NORM:
            squares += values * values
            values *= tl.load(norm + start + column).to(tl.float32)
        total += tl.load(at + start).to(tl.float32) * values[None, :]
        if GATED:
            total_up += tl.load(at + O * I + start).to(tl.float32) * values[None, :]
    found = tl.sum(total, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / I + eps)
        found *= scale
    if scales is not None:
        found *= tl.load(scales + row)
    if BIAS:
        found += tl.load(bias + row).to(tl.float32)
    if GATED:
        up = tl.sum(total_up, 1)
        if NORM:
            up *= scale
        if scales is not None:
            up *= tl.load(scales + O + row)
        if BIAS:
            up += tl.load(bias + O + row).to(tl.float32)
        found = found * tl.sigmoid(found) * up
    if ADD:
        found += tl.load(add + row).to(tl.float32)
    tl.store(out + row, found)
