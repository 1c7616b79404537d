"""Pairs of a token and an expert, sorted by expert and cut into tiles, each of one expert: an expert a program.

The sort is a counting sort in which every program counts for itself, so that none waits for another: each reads which
expert every pair has, twice. Tiles are numbered so that none needs to know how many the experts before it have: those
of expert e whose pairs begin at b stand from b // rows + e on. Up to one tile for each expert stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait

_CHUNK = 8192
"""Pairs a program looks at at a time."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Where the pairs of each expert are. P pairs; pair p is the choice p % A of the token p // A."""

    order_P: Tensor
    """int32: pairs by expert, each expert's in their order; those of other experts are missing."""
    tiles_3T: Tensor
    """int32: of each tile its expert, counted from the first that we have; where in the order it begins; where the
    expert's pairs end. An empty tile begins at its end or behind it. T is the most there can be."""
    rows: int
    """Most pairs of a tile."""


def group(experts_NA: Tensor, *, first: int, count: int, rows: int) -> Groups:
    """Groups for the experts [first, first + count)."""
    num_pairs, device = experts_NA.numel(), experts_NA.device
    num_tiles = num_pairs // rows + count
    order_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    tiles_3T = torch.empty((3, num_tiles), dtype=torch.int32, device=device)
    chunk = min(_CHUNK, max(32, triton.next_power_of_2(num_pairs)))
    _group_experts[(count,)](
        experts_NA,
        order_P,
        tiles_3T,
        num_pairs,
        num_tiles,
        first,
        CHUNK=chunk,
        ROWS=rows,
        num_warps=min(16, max(1, chunk // 256)),
        **overlapped(experts_NA),
    )
    return Groups(order_P, tiles_3T, rows)


@triton.jit
def _group_experts(
    experts,
    order,
    tiles,
    num_pairs,
    num_tiles,
    first,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    index = tl.program_id(0)
    pair = tl.arange(0, CHUNK)
    wait(OVERLAP)
    before = tl.zeros((CHUNK,), tl.int32)
    ours = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        expert = tl.load(experts + start + pair, mask=start + pair < num_pairs, other=-1) - first
        before += ((expert >= 0) & (expert < index)).to(tl.int32)
        ours += (expert == index).to(tl.int32)
    begin = tl.sum(before, 0)
    end = begin + tl.sum(ours, 0)
    place = begin
    for start in range(0, num_pairs, CHUNK):
        expert = tl.load(experts + start + pair, mask=start + pair < num_pairs, other=-1) - first
        here = (expert == index).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, 0) - 1, start + pair, mask=here > 0)
        place += tl.sum(here, 0)
    tile = begin // ROWS + index
    until = end // ROWS + index + 1
    if index == tl.num_programs(0) - 1:
        until = num_tiles
    lane = tl.arange(0, 32)
    for start in range(0, until - tile, 32):
        number = start + lane
        inside = tile + number < until
        at = tiles + tile + number
        tl.store(at, tl.zeros((32,), tl.int32) + index, mask=inside)
        tl.store(at + num_tiles, begin + number * ROWS, mask=inside)
        tl.store(at + 2 * num_tiles, tl.zeros((32,), tl.int32) + end, mask=inside)
