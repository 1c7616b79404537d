"""Rows in eight bits with a scale each, a row a program: by themselves, or as the last act of a kernel that made them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.kernels.overlap import overlapped, wait
from services.engine.ops.quantize import SMALLEST

MOST_COLUMNS = 16384
"""A program holds a row of so many at once."""


def empty(num_rows: int, size: int, form: RowScaled, *, device: torch.device) -> Quantized:
    """Room for rows in this form."""
    values = torch.empty((num_rows, size), dtype=form.dtype, device=device)
    return Quantized(values, torch.empty(num_rows, dtype=torch.float32, device=device))


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
        form.largest,
        SIZE=size,
        WIDTH=width,
        num_warps=warps_for(width),
        **overlapped(x_NI),
    )
    return out


@triton.jit
def _quantize(x, out, scales, largest, SIZE: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    wait(OVERLAP)
    if SIZE <= WIDTH:
        values = tl.load(x + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        store_quantized(values, row, out, scales, largest, SIZE, WIDTH)
    else:
        peaks = tl.zeros((WIDTH,), tl.float32)
        for start in tl.range(0, SIZE, WIDTH):
            values = tl.load(x + row * SIZE + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
            peaks = _larger(peaks, tl.abs(values))
        factor = store_scale(peaks, row, scales, largest)
        for start in tl.range(0, SIZE, WIDTH):
            inside = start + column < SIZE
            values = tl.load(x + row * SIZE + start + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row * SIZE + start + column, (values * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_quantized(values, row, out, scales, largest, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Quantizes a whole row of float32 values, zeros behind its end."""
    factor = store_scale(tl.abs(values), row, scales, largest)
    column = tl.arange(0, WIDTH)
    tl.store(out + row * SIZE + column, (values * factor).to(out.dtype.element_ty), mask=column < SIZE)


@triton.jit
def store_scale(magnitudes, row, scales, largest):
    """Stores what the values of a row must be multiplied with to come back, and returns what to multiply them with before."""
    peak = _larger(tl.reduce(magnitudes, 0, _larger), _SMALLEST)
    tl.store(scales + row, tl.div_rn(peak, largest))
    return tl.div_rn(largest, peak)


@triton.jit
def _larger(a, b):
    """NaN if either is, which `tl.max` would leave out."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


_SMALLEST = tl.constexpr(SMALLEST)
