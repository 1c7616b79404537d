"""One row times a weight matrix: bound by reading the matrix, and by how many of its bytes are on their way at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Unnormed
from services.engine.ops.kernels.bits import widened
from services.engine.ops.kernels.overlap import overlapped, wait
from services.engine.ops.kernels.skinny import BLOCK


class Tile(NamedTuple):
    """Of the matrix, what a program takes at a time, and how it runs."""

    rows: int
    columns: int
    warps: int
    stages: int
    side: int
    """How many products that lie side by side are added up at once: in a tall tile those that a thread has loaded
    together, for it has no registers to keep each apart."""


NARROW, WIDE = Tile(4, 1024, 4, 4, side=1), Tile(8, 1024, 4, 4, side=8)
"""For a matrix in 16 bits with few columns, and with many (measured on an H200)."""

EIGHT_BITS, EIGHT_BITS_SMALL, EIGHT_BITS_LONG = (
    Tile(8, 2048, 4, 3, 16),
    Tile(4, 2048, 2, 3, 16),
    Tile(16, 2048, 8, 2, 16),
)
"""For one in 8 bits; with few rows; with few that are long (measured on an H200 in whole steps of Llama-3.1-8B in fp8: much of a
matrix is read while the kernel before it ends)."""

_MANY_COLUMNS = 4096
_FEW_ROWS, _LONG = 4096, 8192


def is_supported(weight: Tensor) -> bool:
    """Whether the matrix, [O, I], falls into whole tiles; gate and up one over the other do as well then."""
    outputs, columns = weight.shape
    return weight.itemsize <= 2 and weight.dtype is not torch.int16 and outputs % 8 == 0 and columns % 256 == 0


def tile_of(weight: Tensor) -> Tile:
    """The tile that serves, with fewer columns where a row has no multiple of those."""
    rows, all_columns = weight.shape
    if weight.itemsize == 1:
        tile = EIGHT_BITS
        if all_columns >= _LONG and rows <= 2 * _FEW_ROWS and rows % EIGHT_BITS_LONG.rows == 0:
            tile = EIGHT_BITS_LONG
        elif rows <= _FEW_ROWS:
            tile = EIGHT_BITS_SMALL
    else:
        tile = WIDE if all_columns >= _MANY_COLUMNS else NARROW
    columns = tile.columns
    while all_columns % columns:
        columns //= 2
    return tile._replace(columns=columns)


def gemv(
    x: Tensor | Unnormed,
    weight: Tensor,
    *,
    scales: Tensor | None = None,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    gated: bool = False,
) -> Tensor:
    """x @ weight.T * scales + bias + add, [1, O], in the dtype of x or another one; or, of that, silu of the first half times the
    second. `scales`: [O], or of blocks of the matrix, as `skinny.matmul` takes them. Where x is to be normed, the product is with what the norm gives before that is rounded."""
    x_1I, norm_I, eps = x if isinstance(x, Unnormed) else (x, x, 0.0)
    tall, group = BLOCK if scales is not None and scales.dim() == 2 else (1, 0)
    outputs = weight.shape[0]
    lines = triton.cdiv(outputs, tall)
    rows, columns, warps, stages, side = tile_of(weight)
    if gated:
        rows, outputs = rows // 2, outputs // 2
    out = torch.empty((1, outputs), dtype=dtype or x_1I.dtype, device=x_1I.device)
    _gemv[(outputs // rows,)](
        x_1I,
        weight,
        out,
        scales,
        x_1I if bias_O is None else bias_O,
        x_1I if add is None else add,
        norm_I,
        eps,
        I=x_1I.shape[1],
        O=outputs,
        LINES=lines,
        ROWS=rows,
        COLUMNS=columns,
        TALL=tall,
        GROUP=group,
        BIAS=bias_O is not None,
        ADD=add is not None,
        NORM=isinstance(x, Unnormed),
        GATED=gated,
        SIDE=side,
        STAGES=stages,
        num_warps=warps,
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
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TALL: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    SIDE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = weight + row.to(tl.int64)[:, None] * I + column[None, :]
    first = tl.load(at)  # on its way while the kernel before ends
    if GATED:
        first_up = tl.load(at + O * I)
    if NORM:
        first_norm = tl.load(norm + column)
    wait(OVERLAP)
    values = tl.load(x + column).to(tl.float32)
    if NORM:
        # The root of the mean square is known at the end, and divides a sum as well as what is added up.
        squares = values * values
        values *= first_norm.to(tl.float32)
    total = _dots(first, values, scales, row, 0, LINES, ROWS, COLUMNS, TALL, GROUP, SIDE)
    if GATED:
        total_up = _dots(first_up, values, scales, O + row, 0, LINES, ROWS, COLUMNS, TALL, GROUP, SIDE)
    for start in tl.range(COLUMNS, I, COLUMNS, num_stages=STAGES):
        tile = tl.load(at + start)
        if GATED:
            tile_up = tl.load(at + O * I + start)
        values = tl.load(x + start + column).to(tl.float32)
        if NORM:
            squares += values * values
            values *= tl.load(norm + start + column).to(tl.float32)
        total += _dots(tile, values, scales, row, start, LINES, ROWS, COLUMNS, TALL, GROUP, SIDE)
        if GATED:
            total_up += _dots(tile_up, values, scales, O + row, start, LINES, ROWS, COLUMNS, TALL, GROUP, SIDE)
    found = _found(total, scales, row, GROUP)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / I + eps)
        found *= scale
    if BIAS:
        found += tl.load(bias + row).to(tl.float32)
    if GATED:
        up = _found(total_up, scales, O + row, GROUP)
        if NORM:
            up *= scale
        if BIAS:
            up += tl.load(bias + O + row).to(tl.float32)
        found = found * tl.sigmoid(found) * up
    if ADD:
        found += tl.load(add + row).to(tl.float32)
    tl.store(out + row, found)


@triton.jit
def _dots(
    tile, values, scales, row, start,
    LINES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr, GROUP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The products of a tile, each SIDE of them that lie side by side added up: [ROWS, COLUMNS / SIDE]. One thread has loaded
    them at once, and keeps one sum instead of so many."""
    EACH: tl.constexpr = COLUMNS // SIDE
    found = tl.sum(tl.reshape(widened(tile, tl.float32) * values[None, :], (ROWS, EACH, SIDE)), 2)
    if GROUP:
        group = (start + tl.arange(0, EACH) * SIDE) // GROUP
        found *= tl.load(scales + group[None, :] * LINES + (row // TALL)[:, None])
    return found


@triton.jit
def _found(total, scales, row, GROUP: tl.constexpr):
    """The sums of rows, in their scales."""
    found = tl.sum(total, 1)
    if GROUP == 0 and scales is not None:
        found *= tl.load(scales + row)
    return found
