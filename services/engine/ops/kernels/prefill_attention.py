"""Causal attention of chunks of prompts over their pages ("FlashAttention-2", Dao 2023, with paged keys and values).

A tile holds the queries of all G heads that share a kv head, for as many tokens as fit; keys are always taken in tiles
that begin at multiples of their size, so what a token gets does not depend on how its prompt was cut.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels.decode_attention import LOG2_E


def attend(
    q_NHD: Tensor,
    out_NHD: Tensor,
    cache: KVCache,
    layer: int,
    *,
    tables: Tensor,
    slots_S: Tensor,
    lengths_S: Tensor,
    query_starts: Tensor,
    max_query: int,
    scale: float,
    window: int | None,
) -> None:
    """As `ops.attention.paged_attention` for works whose tokens begin at `query_starts` (S + 1 of them) in `q_NHD`;
    writes their rows of `out_NHD`. `max_query`: no work has more tokens."""
    _, heads, head_dim = q_NHD.shape
    kv_heads = cache.shape.kv_heads
    group = heads // kv_heads
    kv = cache.layers[layer].kv
    is_wide = q_NHD.dtype.itemsize > 2
    rows = 32 if is_wide else 64
    tokens = max(1, rows // triton.next_power_of_2(group))
    tile = min(cache.block_size, 32 if is_wide else 64)
    _attend[(triton.cdiv(max_query, tokens), kv_heads, len(slots_S))](
        q_NHD,
        kv,
        out_NHD,
        tables,
        slots_S,
        lengths_S,
        query_starts,
        scale * LOG2_E,
        tables.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        q_NHD.stride(0),
        G=group,
        GROUP=triton.next_power_of_2(group),
        D=head_dim,
        WIDTH=max(16, triton.next_power_of_2(head_dim)),
        TOKENS=tokens,
        T=cache.block_size,
        TILE=tile,
        WINDOW=window or 0,
        PRECISION="ieee" if is_wide else "tf32",
        num_warps=4,
        num_stages=2 if is_wide else 3,
    )


@triton.jit
def _attend(
    q,
    kv,
    out,
    tables,
    slots,
    lengths,
    query_starts,
    scale,
    table_stride,
    block_stride,
    v_stride,
    head_stride,
    token_stride,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * GROUP
    # The last tile of a prompt has the most keys: it begins first.
    tile_of, head, work = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(query_starts + work)
    count = tl.load(query_starts + work + 1) - first
    if tile_of * TOKENS >= count:
        return
    length = tl.load(lengths + work)
    table = tables + tl.load(slots + work).to(tl.int64) * table_stride

    row = tl.arange(0, ROWS)
    token = tile_of * TOKENS + row // GROUP
    place = tl.arange(0, WIDTH)
    held = ((token < count) & (row % GROUP < G))[:, None] & (place < D)[None, :]
    at = (first + token).to(tl.int64)[:, None] * token_stride + (head * G + row % GROUP)[:, None] * D + place[None, :]
    queries = tl.load(q + at, mask=held, other=0.0)
    position = length - count + token
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    lowest = length - count + tile_of * TOKENS
    end = tl.minimum(lowest + TOKENS, length)
    start = 0
    if WINDOW > 0:
        start = (tl.maximum(lowest - WINDOW + 1, 0) // TILE) * TILE
        whole = start
    else:
        whole = ((lowest + 1) // TILE) * TILE
    # Tiles that every row sees as a whole, then those at the edges. Where a tile lies is looked up one tile ahead, so that
    # its loads need not wait for that.
    key = tl.arange(0, TILE)[:, None]
    inner = kv + head * head_stride + place[None, :]
    block = tl.load(table + start // T)
    for tile in range(start, whole, TILE):
        base = inner + block.to(tl.int64) * block_stride + (tl.multiple_of(tile % T, TILE) + key) * D
        block = tl.load(table + (tile + TILE) // T, mask=tile + TILE < whole, other=0)
        if WIDTH == D:
            keys, values = tl.load(base), tl.load(base + v_stride)
        else:
            keys = tl.load(base, mask=place[None, :] < D, other=0.0)
            values = tl.load(base + v_stride, mask=place[None, :] < D, other=0.0)
        peak, total, found = _take_in(queries, keys, values, keys, peak, total, found, scale, False, PRECISION)
    for tile in range(whole, end, TILE):
        base = inner + tl.load(table + tile // T).to(tl.int64) * block_stride + (tile % T + key) * D
        # Beyond the sequence's end a page holds anything.
        there = (tile + key < length) & (place[None, :] < D)
        keys = tl.load(base, mask=there, other=0.0)
        values = tl.load(base + v_stride, mask=there, other=0.0)
        behind = position[:, None] - (tile + tl.arange(0, TILE))[None, :]
        seen = behind >= 0
        if WINDOW > 0:
            seen = seen & (behind < WINDOW)
        peak, total, found = _take_in(queries, keys, values, seen, peak, total, found, scale, True, PRECISION)
    tl.store(out + at, found / tl.where(total > 0, total, 1.0)[:, None], mask=held)


@triton.jit
def _take_in(
    queries, keys, values, seen, peak, total, found, scale, SOME_HIDDEN: tl.constexpr, PRECISION: tl.constexpr
):
    """One more tile: the highest score of each row so far, the sum of its weights, and what it found by them. `seen` is
    looked at where some keys are hidden."""
    scores = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
    if SOME_HIDDEN:
        scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    if SOME_HIDDEN:
        weights = tl.where(seen, weights, 0.0)
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(weights, 1)
    found = tl.dot(weights.to(values.dtype), values, found * fade[:, None], input_precision=PRECISION)
    return higher, total, found
