"""Rows in eight bits with a scale each, a row a program: by themselves, or as the last act of a kernel that made them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import FINER, Quantized, RowScaled
from services.engine.ops.kernels.overlap import overlapped, wait
from services.engine.ops.quantize import SMALLEST

MOST_COLUMNS = 16384
"""A program holds a row of so many at once."""


def empty(num_rows: int, size: int, form: RowScaled, *, device: torch.device) -> Quantized:
    """Room for rows in this form."""
    values = torch.empty((num_rows * form.parts, size), dtype=form.dtype, device=device)
    shape = (num_rows,) if form.share is None else (triton.cdiv(size, form.share), num_rows)
    return Quantized(values, torch.empty(shape, dtype=torch.float32, device=device))


def rounding(form: RowScaled, width: int) -> tuple[float, Tensor | None, int, int]:
    """What a kernel that holds so many values must be told of the form, for `store_quantized`: the largest value, the scale for all, and,
    as constants, parts and groups that share a scale."""
    return form.largest, form.by, form.parts, min(form.share or 0, width)


def warps_for(width: int) -> int:
    """Sixteen values a thread, up to a block of 32 warps."""
    return min(32, max(1, width // 512))


def quantize(x_NI: Tensor, form: RowScaled) -> Quantized:
    """As `ops.quantize.quantize`, of a dense x."""
    num_rows, size = x_NI.shape
    out = empty(num_rows, size, form, device=x_NI.device)
    width = min(triton.next_power_of_2(size), MOST_COLUMNS)
    _quantize[(num_rows,)](
        x_NI,
        *out,
        *rounding(form, width),
        SIZE=size,
        WIDTH=width,
        num_warps=warps_for(width),
        **overlapped(x_NI),
    )
    return out


@triton.jit
def _quantize(
    x, out, scales, largest, by, PARTS: tl.constexpr, SHARE: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    wait(OVERLAP)
    if SIZE <= WIDTH:
        values = tl.load(x + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        store_quantized(values, row, out, scales, largest, by, PARTS, SHARE, SIZE, WIDTH)
    elif SHARE:
        for start in tl.range(0, SIZE, WIDTH):
            values = tl.load(x + row * SIZE + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
            _store_groups(values, row, start, out, scales, largest, SHARE, SIZE, WIDTH)
    else:
        peaks = tl.zeros((WIDTH,), tl.float32)
        for start in tl.range(0, SIZE, WIDTH):
            values = tl.load(x + row * SIZE + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
            peaks = _larger(peaks, tl.abs(values))
        factor = _store_scale(peaks, row, scales, largest, by)
        for start in tl.range(0, SIZE, WIDTH):
            values = tl.load(x + row * SIZE + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
            _store(_times(values, factor), row, start, out, by, PARTS, SIZE, WIDTH)


@triton.jit
def store_quantized(
    values, row, out, scales, largest, by,
    PARTS: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Quantizes a whole row of float32 values, zeros behind its end, in the form that `rounding` tells of."""
    if SHARE:
        _store_groups(values, row, 0, out, scales, largest, SHARE, SIZE, WIDTH)
    else:
        factor = _store_scale(tl.abs(values), row, scales, largest, by)
        _store(_times(values, factor), row, 0, out, by, PARTS, SIZE, WIDTH)


@triton.jit
def _store_groups(
    values, row, start, out, scales, largest, SHARE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Quantizes a row from the column `start` on, each group of it by its own scale."""
    groups = tl.reshape(values, (WIDTH // SHARE, SHARE))
    peak = _larger(tl.reduce(tl.abs(groups), 1, _larger), _SMALLEST)
    group = start // SHARE + tl.arange(0, WIDTH // SHARE)
    at = scales + group * tl.num_programs(0).to(tl.int64) + row
    tl.store(at, tl.div_rn(peak, largest), mask=group < (SIZE + SHARE - 1) // SHARE)
    steps = tl.reshape(_times(groups, tl.div_rn(largest, peak)[:, None]), (WIDTH,))
    _store(steps, row, start, out, None, 1, SIZE, WIDTH)


@triton.jit
def _store_scale(magnitudes, row, scales, largest, by):
    """Stores what the values of a row must be multiplied with to come back, and returns what to multiply them with before."""
    peak = _larger(tl.reduce(magnitudes, 0, _larger), _SMALLEST)
    if by is None:
        scale, factor = tl.div_rn(peak, largest), tl.div_rn(largest, peak)
    else:
        scale = tl.load(by) + peak * 0.0
        factor = tl.div_rn(1.0, scale)
    tl.store(scales + row, scale)
    return factor


@triton.jit
def _store(
    steps, row, start, out, by,
    PARTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rounds and stores the steps of a row from the column `start` on."""
    column = start + tl.arange(0, WIDTH)
    inside = column < SIZE
    num_rows = tl.num_programs(0).to(tl.int64)
    if out.dtype.element_ty == tl.int8:
        if by is not None:
            steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
        biased = steps + _WHOLE
        tl.store(out + row * SIZE + column, _low_bytes(biased), mask=inside)
        if PARTS == 2:
            finer = _times(steps - (biased - _WHOLE), _FINER)
            tl.store(out + (num_rows + row) * SIZE + column, _low_bytes(finer + _WHOLE), mask=inside)
    else:
        tl.store(out + row * SIZE + column, steps.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _times(x, factor):
    """The product, rounded by itself: a compiler would take it together with the sum behind it, and round once."""
    if _IS_COMPILED:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, factor], dtype=tl.float32, is_pure=True, pack=1
        )
    return x * factor


@triton.jit
def _low_bytes(biased):
    """The whole numbers to which `_WHOLE` was added: their last places are those of the sum."""
    return biased.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _larger(a, b):
    """NaN if either is, which `tl.max` would leave out."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


_IS_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
_SMALLEST = tl.constexpr(SMALLEST)
_FINER = tl.constexpr(FINER)
_WHOLE = tl.constexpr(1.5 * 2**23)
"""Added to a number of few places, it leaves no room for a fraction. To convert it would take four times as long."""
