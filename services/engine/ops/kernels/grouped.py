"""Products of grouped rows, each group with the matrix of its expert: `gated` with gate and up, `down` with down, and
`weighed`, the sum over a token's experts.

The products are computed transposed, as in `skinny`: the matrix is the operand of 64 rows and more that Hopper's matrix
units want, a tile's pairs are the narrow one. So one kernel serves a few rows an expert, where all is bound by reading
each matrix once, and many, where it is bound by arithmetic.

An expert's answers are written pair by pair in the dtype of x, then added up in float32 in the order of a token's
choices: the sum depends on nothing else in the step, and is the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.grouping import Groups
from services.engine.ops.kernels.overlap import overlapped, wait


class Tile(NamedTuple):
    """What a program takes at a time, and how it runs."""

    rows: int
    """Of the matrix; of gate and up together where it takes both."""
    columns: int
    warps: int
    stages: int


TILES = {
    32: Tile(rows=64, columns=128, warps=4, stages=4),
    64: Tile(rows=128, columns=64, warps=4, stages=4),
    128: Tile(rows=256, columns=64, warps=8, stages=4),
}
"""For at most so many pairs, of 16 bits: few as `skinny` has it, many as large as registers allow. (chosen before there was a GPU; with them a
step of 32 sequences of Qwen3-30B-A3B reads its experts at 4.4 TB/s on an H200)."""

_WIDE = Tile(rows=32, columns=32, warps=4, stages=2)
"""For any number of pairs of 32 bits."""


def tile(groups: Groups, dtype: torch.dtype) -> Tile:
    """What `TILES` has for these groups."""
    return _WIDE if dtype.itemsize > 2 else next(tile for most, tile in TILES.items() if groups.rows <= most)


def gated(x_NI: Tensor, gate_up_EOI: Tensor, groups: Groups, *, top_k: int) -> Tensor:
    """silu(gate) * up of each pair, [P, F], in the order of the groups; in float32, then rounded to the dtype of x."""
    outputs = gate_up_EOI.shape[1] // 2
    h_PF = torch.empty((len(groups.order_P), outputs), dtype=x_NI.dtype, device=x_NI.device)
    _launch(x_NI, gate_up_EOI, h_PF, groups, top_k=top_k, is_gated=True)
    return h_PF


def down(h_PF: Tensor, down_EIF: Tensor, groups: Groups) -> Tensor:
    """What each pair's expert answers, [P, I], a token's pairs side by side; pairs of other experts hold anything."""
    answers_PI = torch.empty((len(groups.order_P), down_EIF.shape[1]), dtype=h_PF.dtype, device=h_PF.device)
    _launch(h_PF, down_EIF, answers_PI, groups, top_k=1, is_gated=False)
    return answers_PI


def _launch(x: Tensor, weight: Tensor, out: Tensor, groups: Groups, *, top_k: int, is_gated: bool) -> None:
    outputs, inputs = out.shape[1], x.shape[1]
    taken, num_tiles = tile(groups, x.dtype), groups.tiles_3T.shape[1]
    features = taken.rows // 2 if is_gated else taken.rows
    _experts_product[(triton.cdiv(outputs, features), num_tiles)](
        x,
        weight,
        out,
        groups.order_P,
        groups.tiles_3T,
        num_tiles,
        O=outputs,
        I=inputs,
        A=top_k,
        M=groups.rows,
        ROWS=taken.rows,
        COLUMNS=taken.columns,
        GATED=is_gated,
        EVEN=inputs % taken.columns == 0,
        PRECISION="ieee" if x.dtype.itemsize > 2 else "tf32",
        STAGES=taken.stages,
        num_warps=taken.warps,
        **overlapped(x),
    )


@triton.jit
def _experts_product(
    x,
    weight,
    out,
    order,
    tiles,
    num_tiles,
    O: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile = tl.program_id(1)
    wait(OVERLAP)
    # All three at once: the way to memory is as long as what a program does by itself.
    expert = tl.load(tiles + tile).to(tl.int64)
    begin = tl.load(tiles + num_tiles + tile)
    end = tl.load(tiles + 2 * num_tiles + tile)
    if begin >= end:
        return
    matrix = weight + expert * ((2 if GATED else 1) * O * I)
    if M >= 64 and end - begin <= M // 2:
        # An expert's last pairs: half of the arithmetic for at most half of a tile.
        _multiply(x, matrix, out, order, begin, end, O, I, A, M // 2, ROWS, COLUMNS, GATED, EVEN, PRECISION, STAGES)
    else:
        _multiply(x, matrix, out, order, begin, end, O, I, A, M, ROWS, COLUMNS, GATED, EVEN, PRECISION, STAGES)


@triton.jit
def _multiply(
    x,
    matrix,
    out,
    order,
    begin,
    end,
    O: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the pairs of an expert with one tile of its matrix."""
    FEATURES: tl.constexpr = ROWS // 2 if GATED else ROWS
    first = tl.program_id(0) * FEATURES
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = begin + tl.arange(0, M)
    inside = place < end
    pair = tl.load(order + place, mask=inside, other=0)
    # Rows behind the matrix's last are computed from that one, and not stored.
    if GATED:
        # Eight rows of gate, then the same eight of up: the matrix units leave both in one thread.
        row = tl.minimum(first + row // 16 * 8 + row % 8, O - 1) + row // 8 % 2 * O
        source, target = pair // A, place
    else:
        row = tl.minimum(first + row, O - 1)
        source, target = place, pair
    weights = matrix + row[:, None] * I + column[None, :]
    values = x + source.to(tl.int64)[None, :] * I + column[:, None]
    total = tl.zeros((ROWS, M), tl.float32)
    for start in tl.range(0, I, COLUMNS, num_stages=STAGES):
        if EVEN:
            w = tl.load(weights + start)
            v = tl.load(values + start, mask=inside[None, :], other=0.0)
        else:
            there = start + column < I
            w = tl.load(weights + start, mask=there[None, :], other=0.0)
            v = tl.load(values + start, mask=inside[None, :] & there[:, None], other=0.0)
        total = tl.dot(w, v, total, input_precision=PRECISION)
    if GATED:
        both = total.reshape(FEATURES // 8, 2, 8, M).permute(0, 2, 3, 1)
        gate, up = tl.split(both)
        total = (gate * tl.sigmoid(gate) * up).reshape(FEATURES, M)
    output = first + tl.arange(0, FEATURES)
    at = target.to(tl.int64)[None, :] * O + output[:, None]
    tl.store(out + at, total, mask=inside[None, :] & (output < O)[:, None])


_BLOCK = 1024


def weighed(
    answers_PI: Tensor, weights_NA: Tensor, experts_NA: Tensor, *, first: int, count: int, add: Tensor | None
) -> Tensor:
    """The sum of each token's answers by weight, plus `add`, [N, I]; without the answers of experts that are not among
    [first, first + count). Rounded once."""
    (num_tokens, top_k), size = weights_NA.shape, answers_PI.shape[1]
    out = torch.empty((num_tokens, size), dtype=answers_PI.dtype, device=answers_PI.device)
    _experts_sum[(triton.cdiv(size, _BLOCK), num_tokens)](
        answers_PI,
        weights_NA,
        experts_NA,
        answers_PI if add is None else add,
        out,
        first,
        count,
        I=size,
        A=top_k,
        ADD=add is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        **overlapped(out),
    )
    return out


@triton.jit
def _experts_sum(
    answers,
    weights,
    experts,
    add,
    out,
    first,
    count,
    I: tl.constexpr,
    A: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    wait(OVERLAP)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(A):
        expert = tl.load(experts + token * A + choice) - first
        ours = inside & (expert >= 0) & (expert < count)
        answer = tl.load(answers + (token * A + choice) * I + column, mask=ours, other=0.0).to(tl.float32)
        total += answer * tl.load(weights + token * A + choice)
    if ADD:
        total += tl.load(add + token * I + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * I + column, total, mask=inside)
