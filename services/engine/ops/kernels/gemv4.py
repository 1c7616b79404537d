"""One row times a weight matrix in four bits, packed as `int4` says: as `gemv`, bound by reading the matrix if numbers are widened
fast enough.

A number becomes the last places of 128 in float32, by a shift and a mask, and is 136 too large: what that adds to a sum is taken from it
once for all numbers of a group. So each costs three instructions, and nothing is rounded.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Unnormed
from services.engine.ops.kernels.bits import biased, low_half
from services.engine.ops.kernels.int4 import PLANE, SPAN, Packed
from services.engine.ops.kernels.overlap import overlapped, wait


class Tile(NamedTuple):
    """Of the matrix, what a program takes at a time, and how it runs."""

    rows: int
    words: int
    """Of four columns each."""
    warps: int
    stages: int


TILE, LONG = Tile(8, 1024, 4, 3), Tile(8, 512, 4, 3)
"""For a matrix; and for one whose rows are long (measured on an H200 in whole steps of Llama-3.1-8B)."""

_LONG_ROW = 8192
_RUN = tl.constexpr(8)
"""Words of a row that a thread loads at once. It adds up their products without a scale."""


def is_supported(matrix: Packed, dtype: torch.dtype) -> bool:
    """Whether the matrix falls into whole tiles, also gate and up one over the other, for a row in this dtype: 16 bits, as its terms."""
    fits = len(matrix.weight_OW) % TILE.rows == 0 and matrix.inputs % SPAN == 0
    return fits and dtype.itemsize == 2 and dtype == matrix.terms_TO2.dtype


def tile_of(matrix: Packed) -> Tile:
    """The tile that serves, with fewer words where a row has no multiple of those."""
    tile = LONG if matrix.inputs >= _LONG_ROW else TILE
    words = tile.words
    while matrix.weight_OW.shape[1] % words:
        words //= 2
    return tile._replace(words=words)


def gemv(
    x: Tensor | Unnormed,
    matrix: Packed,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    gated: bool = False,
) -> Tensor:
    """x @ weight.T + bias + add, [1, O], as `gemv.gemv` of what the matrix stands for by its terms as they are kept; rounded once."""
    x_1I, norm_I, eps = x if isinstance(x, Unnormed) else (x, x, 0.0)
    rows, words, warps, stages = tile_of(matrix)
    outputs = len(matrix.weight_OW)
    out = torch.empty((1, outputs // 2 if gated else outputs), dtype=dtype or x_1I.dtype, device=x_1I.device)
    _gemv_int4[(outputs // rows,)](
        x_1I,
        matrix.weight_OW,
        matrix.terms_TO2.view(torch.int32),
        out,
        x_1I if bias_O is None else bias_O,
        x_1I if add is None else add,
        norm_I,
        eps,
        I=matrix.inputs,
        O=outputs,
        GROUP=matrix.group,
        PAIRED=matrix.paired,
        SPAN=SPAN,
        PLANE=PLANE,
        ROWS=rows,
        WORDS=words,
        BIAS=bias_O is not None,
        ADD=add is not None,
        NORM=isinstance(x, Unnormed),
        GATED=gated,
        STAGES=stages,
        num_warps=warps,
        **overlapped(x_1I),
    )
    return out


@triton.jit
def _gemv_int4(
    x,
    weight,
    pairs,
    out,
    bias,
    add,
    norm,
    eps,
    I: tl.constexpr,
    O: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRED: tl.constexpr,
    SPAN: tl.constexpr,
    PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Gated, a tile has rows of the gate and then those of up, and both see the same columns."""
    ALL: tl.constexpr = I // SPAN * PLANE
    HALVES: tl.constexpr = 2 if GATED else 1
    EACH: tl.constexpr = ROWS // HALVES
    output = tl.program_id(0) * EACH + tl.arange(0, EACH)
    row = tl.arange(0, ROWS)
    row = tl.program_id(0) * EACH + row % EACH + row // EACH * (O // HALVES)
    word = tl.arange(0, WORDS)
    at = weight + row.to(tl.int64)[:, None] * ALL + word[None, :]
    words = tl.load(at)  # on its way while the kernel before ends
    wait(OVERLAP)
    total = tl.zeros((ROWS, WORDS // _RUN), tl.float32)
    squares = tl.zeros((WORDS // _RUN,), tl.float32)
    total, squares = _dots(
        words, 0, x, norm, pairs, row, total, squares, O, GROUP, PAIRED, SPAN, PLANE, ROWS, WORDS, NORM
    )
    for start in tl.range(WORDS, ALL, WORDS, num_stages=STAGES):
        words = tl.load(at + start)
        total, squares = _dots(
            words, start, x, norm, pairs, row, total, squares, O, GROUP, PAIRED, SPAN, PLANE, ROWS, WORDS, NORM
        )
    found = tl.sum(total, 1)
    if NORM:
        found *= tl.rsqrt(tl.sum(squares, 0) / I + eps)
    if BIAS:
        found += tl.load(bias + row).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(found, (HALVES, EACH))))
        found = gate * tl.sigmoid(gate) * up
    if ADD:
        found += tl.load(add + output).to(tl.float32)
    tl.store(out + output, found)


@triton.jit
def _dots(
    words, start, x, norm, pairs, row, total, squares,
    O: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr, SPAN: tl.constexpr, PLANE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The sums of products, [ROWS, RUNS], with those of a tile; and those of squares of x, [RUNS]."""
    RUNS: tl.constexpr = WORDS // _RUN
    PAIRS: tl.constexpr = SPAN // (2 * GROUP if PAIRED else GROUP)
    word = start + tl.arange(0, WORDS)
    column = word // PLANE * SPAN + word % PLANE
    span = (start + tl.arange(0, RUNS) * _RUN) // PLANE
    for group in tl.static_range(SPAN // GROUP):
        dots = tl.zeros((ROWS, RUNS), tl.float32)
        sums = tl.zeros((RUNS,), tl.float32)
        for place in tl.static_range(GROUP // PLANE):
            values = tl.load(x + column + (group * GROUP + place * PLANE)).to(tl.float32)
            if NORM:
                squares += tl.sum(tl.reshape(values * values, (RUNS, _RUN)), 1)
                values *= tl.load(norm + column + (group * GROUP + place * PLANE)).to(tl.float32)
            numbers = biased(words, group * (GROUP // PLANE) + place)
            sums += tl.sum(tl.reshape(values, (RUNS, _RUN)), 1)
            dots += tl.sum(tl.reshape(numbers * values[None, :], (ROWS, RUNS, _RUN)), 2)
        pair = tl.load(pairs + (span * PAIRS + group * PAIRS * GROUP // SPAN)[None, :] * O + row[:, None])
        dots -= 136 * sums[None, :]
        if PAIRED:
            total += dots * low_half(pair >> 16 * (group % 2), x.dtype.element_ty)
        else:
            total += dots * low_half(pair, x.dtype.element_ty) + sums[None, :] * low_half(
                pair >> 16, x.dtype.element_ty
            )
    return total, squares
