"""Causal attention of chunks of prompts over their pages ("FlashAttention-2", Dao 2023, with paged keys and values).

A tile holds the queries of all G heads that share a kv head, for as many tokens as fit; keys are always taken in tiles
that begin at multiples of their size, so what a token gets does not depend on how its prompt was cut - but for a rounding of keys and
values in 8 bits, which a chunk of many tokens reads from where they were widened (`pages`). `plan` lists once a step which tiles there
are; every layer then works through that list.

Shapes: N tokens of the step, H query heads, K kv heads, G = H / K, D head size, P works, M tiles at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels import kv_quant, softmax
from services.engine.ops.kernels.decode_attention import LOG2_E, number_items
from services.engine.ops.kernels.pages import Pages


class Tuning(NamedTuple):
    """What a program takes at a time, and how it runs."""

    rows: int
    """Of queries: tokens times heads."""
    keys: int
    """At most: never more than a page."""
    warps: int
    stages: int


TUNING = {1: Tuning(64, 64, 4, 3), 2: Tuning(64, 64, 4, 3), 4: Tuning(32, 32, 4, 2)}
"""By the bytes of a cached number (measured on an H200)."""


def tuning(dtype: torch.dtype, itemsize: int) -> Tuning:
    """What `TUNING` has for queries in this dtype and a cache whose narrowest numbers have so many bytes: layers that differ share their
    tiles."""
    return TUNING[4 if dtype.itemsize == 4 else itemsize]


@dataclass(frozen=True, slots=True)
class Work:
    """What the layers of a step share: who attends to what, in tiles."""

    tables: Tensor
    """[rows, blocks] int32: block tables."""
    rows_P: Tensor
    """The table row of each work."""
    lengths_P: Tensor
    """int32: the keys that its last token sees."""
    query_starts: Tensor
    """int32, P + 1 of them: where its tokens begin among N, and where they end."""
    first_P1: Tensor
    """int32, P + 1 of them: each work's first tile, and how many there are."""
    tiles_M2: Tensor
    """int32, of each tile: its work, and its number in it."""
    tokens: int
    """Of a tile."""
    tuning: Tuning


def plan(
    tables: Tensor,
    rows_P: Tensor,
    lengths_P: Tensor,
    query_starts: Tensor,
    counts_P: Tensor,
    *,
    most_tokens: int,
    group: int,
    tuning: Tuning,
) -> Work:
    """Lists the tiles of these works, which have `counts_P` tokens (int32; those that have none are passed over) and
    `most_tokens` together at most."""
    tokens = max(1, tuning.rows // triton.next_power_of_2(group))
    num_works, device = len(rows_P), rows_P.device
    first_P1 = torch.empty(num_works + 1, dtype=torch.int32, device=device)
    most_tiles = most_tokens // tokens + min(num_works, most_tokens)
    tiles_M2 = torch.empty((most_tiles, 2), dtype=torch.int32, device=device)
    number_items[(1,)](counts_P, first_P1, num_works, tokens, S=triton.next_power_of_2(num_works))
    _list_tiles[(num_works,)](first_P1, tiles_M2, B=64, num_warps=1)
    return Work(tables, rows_P, lengths_P, query_starts, first_P1, tiles_M2, tokens, tuning)


def attend(
    q_NHD: Tensor,
    out_NHD: Tensor,
    cache: KVCache,
    layer: int,
    work: Work,
    *,
    scale: float,
    window: int | None,
    pages: Pages | None = None,
    alike: bool = False,
) -> None:
    """As `ops.attention.paged_attention` for these works; writes their rows of `out_NHD`. `pages`: in which some works find what this
    layer keeps in 8 bits; there is no window then. `alike`: tiles of keys that all
    rows see as a whole go the way of the others, so that a compiler's choices for the one way or the other - which product
    is added without being rounded, for one - cannot tell rows apart."""
    _, heads, head_dim = q_NHD.shape
    kv_heads = cache.shape.kv_heads
    group = heads // kv_heads
    kv, scales = cache.layers[layer].kv, cache.layers[layer].scales
    _, keys, warps, stages = work.tuning
    _attend_prompts[(len(work.tiles_M2), kv_heads)](
        q_NHD,
        kv,
        scales,
        out_NHD,
        None if pages is None else pages.wide,
        None if pages is None else pages.first_P1,
        None if pages is None else pages.order_W,
        work.tables,
        work.rows_P,
        work.lengths_P,
        work.query_starts,
        work.first_P1,
        work.tiles_M2,
        len(work.rows_P),
        scale * LOG2_E,
        work.tables.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        None if scales is None else scales.stride(0),
        q_NHD.stride(0),
        G=group,
        GROUP=triton.next_power_of_2(group),
        D=head_dim,
        WIDTH=max(16, triton.next_power_of_2(head_dim)),
        TOKENS=work.tokens,
        T=cache.block_size,
        TILE=min(cache.block_size, keys),
        WINDOW=window or 0,
        ALIKE=alike,
        PRECISION="ieee" if q_NHD.dtype is torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit
def _list_tiles(first, tiles, B: tl.constexpr):
    work = tl.program_id(0)
    start, end = tl.load(first + work), tl.load(first + work + 1)
    for at in range(start, end, B):
        item = at + tl.arange(0, B)
        inside = item < end
        tl.store(tiles + item * 2, tl.zeros((B,), tl.int32) + work, mask=inside)
        # The last tile of a prompt has the most keys: it begins first.
        tl.store(tiles + item * 2 + 1, end - 1 - item, mask=inside)


@triton.jit
def _attend_prompts(
    q,
    kv,
    scales,
    out,
    wide,
    first_pages,
    order,
    tables,
    slots,
    lengths,
    query_starts,
    tile_starts,
    tiles,
    num_works,
    scale,
    table_stride,
    block_stride,
    v_stride,
    head_stride,
    scale_stride,
    token_stride,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIKE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * GROUP
    item, head = tl.program_id(0), tl.program_id(1)
    if item >= tl.load(tile_starts + num_works):
        return
    work, tile_of = tl.load(tiles + item * 2), tl.load(tiles + item * 2 + 1)
    first = tl.load(query_starts + work)
    count = tl.load(query_starts + work + 1) - first
    length = tl.load(lengths + work)
    table = tables + tl.load(slots + work).to(tl.int64) * table_stride

    row = tl.arange(0, ROWS)
    token = tile_of * TOKENS + row // GROUP
    place = tl.arange(0, WIDTH)
    held = ((token < count) & (row % GROUP < G))[:, None] & (place < D)[None, :]
    at = (first + token).to(tl.int64)[:, None] * token_stride + (head * G + row % GROUP)[:, None] * D + place[None, :]
    queries = tl.load(q + at, mask=held, other=0.0)
    position = length - count + token
    lowest = length - count + tile_of * TOKENS
    if wide is None:
        total, found = _gathered(
            queries, position, kv, scales, table, head, place, lowest, length, scale, block_stride, v_stride, head_stride,
            scale_stride, D, WIDTH, TOKENS, T, TILE, WINDOW, ALIKE, PRECISION,
        )  # fmt: skip
    else:
        # One launch for both ways: they take the same room, and a program of another one that is not needed takes as long as reading
        # some pages.
        first_page = tl.load(first_pages + work)
        if first_page >= 0:
            kv_heads = tl.num_programs(1)
            total, found = _gathered(
                queries, position, wide, None, order + first_page, head, place, lowest, length, scale, 2 * kv_heads * T * D,
                kv_heads * T * D, T * D, None, D, WIDTH, TOKENS, T, TILE, WINDOW, ALIKE, PRECISION,
            )  # fmt: skip
        else:
            total, found = _gathered(
                queries, position, kv, scales, table, head, place, lowest, length, scale, block_stride, v_stride, head_stride,
                scale_stride, D, WIDTH, TOKENS, T, TILE, WINDOW, ALIKE, PRECISION,
            )  # fmt: skip
    tl.store(out + at, found / tl.where(total > 0, total, 1.0)[:, None], mask=held)


@triton.jit
def _gathered(
    queries,
    position,
    kv,
    scales,
    table,
    head,
    place,
    lowest,
    length,
    scale,
    block_stride,
    v_stride,
    head_stride,
    scale_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIKE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum of each query's weights, and what it found by them. Queries stand at these positions, the first at `lowest`."""
    ROWS: tl.constexpr = queries.shape[0]
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    end = tl.minimum(lowest + TOKENS, length)
    start = 0
    if WINDOW > 0:
        start = (tl.maximum(lowest - WINDOW + 1, 0) // TILE) * TILE
        whole = start
    elif ALIKE:
        whole = 0
    else:
        whole = ((lowest + 1) // TILE) * TILE
    # Tiles that every row sees as a whole, then those at the edges. Where a tile lies is looked up one tile ahead, so that
    # its loads need not wait for that.
    key = tl.arange(0, TILE)[:, None]
    inner = kv + head * head_stride + place[None, :]
    block = tl.load(table + start // T)
    if scales is not None:
        queries, largest = kv_quant.normed(queries)
        row_scale = largest * scale
    for tile in range(start, whole, TILE):
        if scales is not None:
            inside = tl.multiple_of(tile % T, TILE) + tl.arange(0, TILE)
            keys, values, key_scales, value_scales = kv_quant.load_tile(
                kv, scales, block, inside, None, head, place, block_stride, v_stride, head_stride, scale_stride,
                tl.num_programs(1), D, T, WIDTH,
            )  # fmt: skip
            block = tl.load(table + (tile + TILE) // T, mask=tile + TILE < whole, other=0)
            peak, total, found = kv_quant.take_in(
                queries, keys, values, key_scales, value_scales, inside, peak, total, found, row_scale,
                False, PRECISION,
            )  # fmt: skip
        else:
            base = inner + block.to(tl.int64) * block_stride + (tl.multiple_of(tile % T, TILE) + key) * D
            block = tl.load(table + (tile + TILE) // T, mask=tile + TILE < whole, other=0)
            if WIDTH == D:
                keys, values = tl.load(base), tl.load(base + v_stride)
            else:
                keys = tl.load(base, mask=place[None, :] < D, other=0.0)
                values = tl.load(base + v_stride, mask=place[None, :] < D, other=0.0)
            peak, total, found = _take_in(queries, keys, values, keys, peak, total, found, scale, False, PRECISION)
    for tile in range(whole, end, TILE):
        # Beyond the sequence's end a page holds anything.
        if scales is not None:
            inside = tl.multiple_of(tile % T, TILE) + tl.arange(0, TILE)
            keys, values, key_scales, value_scales = kv_quant.load_tile(
                kv, scales, tl.load(table + tile // T), inside, tile + tl.arange(0, TILE) < length, head, place,
                block_stride, v_stride, head_stride, scale_stride, tl.num_programs(1), D, T, WIDTH,
            )  # fmt: skip
        else:
            base = inner + tl.load(table + tile // T).to(tl.int64) * block_stride + (tile % T + key) * D
            there = (tile + key < length) & (place[None, :] < D)
            keys = tl.load(base, mask=there, other=0.0)
            values = tl.load(base + v_stride, mask=there, other=0.0)
        behind = position[:, None] - (tile + tl.arange(0, TILE))[None, :]
        seen = behind >= 0
        if WINDOW > 0:
            seen = seen & (behind < WINDOW)
        if scales is not None:
            peak, total, found = kv_quant.take_in(
                queries, keys, values, key_scales, value_scales, seen, peak, total, found, row_scale,
                True, PRECISION,
            )  # fmt: skip
        else:
            peak, total, found = _take_in(queries, keys, values, seen, peak, total, found, scale, True, PRECISION)
    return total, found


@triton.jit
def _take_in(
    queries, keys, values, seen, peak, total, found, scale, SOME_HIDDEN: tl.constexpr, PRECISION: tl.constexpr
):
    """One more tile: the highest score of each row so far, the sum of its weights, and what it found by them. `seen` is
    looked at where some keys are hidden."""
    scores = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
    peak, total, weights, fade = softmax.take_in(scores, seen, peak, total, SOME_HIDDEN)
    found = tl.dot(weights.to(values.dtype), values, found * fade[:, None], input_precision=PRECISION)
    return peak, total, found
