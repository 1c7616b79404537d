"""Attention of one query token a sequence over its pages, each sequence cut into chunks.

`plan` lists once a step which (sequence, chunk) pairs there are; every layer then works through that list. A sequence is
cut into as few chunks as none is longer than the limit, all of one length, so that none waits for another; how it is cut
depends on no other sequence. The last chunk of a sequence to be done adds up all of them ("split-KV", Dao et al. 2023,
"Flash-Decoding"; the counter instead of a second launch is stream-K's, Osama et al. 2023).

Rows of a tile of scores are the G query heads that share one kv head, padded to 16, the least that matrix units take. In 8 bits, where
to multiply takes longer than to read, these heads are columns, padded to 8: half the products and weights of nobody.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels import kv_quant, softmax
from services.engine.ops.kernels.overlap import overlapped, wait

LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """How a batch is cut, and how a program runs."""

    chunk: int
    """Most tokens of a chunk."""
    warps: int
    stages: int


_TILE_BYTES = 16 << 10
"""Of keys: so many leave room for those of some stages, and registers for the rest."""

_FEW, _SOME, _ALL = 64, 256, sys.maxsize

TUNING = {
    1: {_FEW: Tuning(128, 1, 2), _FEW * 2: Tuning(640, 2, 3), _SOME: Tuning(4096, 2, 3), _ALL: Tuning(4096, 1, 2)},
    2: {_FEW: Tuning(192, 2, 3), _FEW * 2: Tuning(384, 2, 2), _SOME: Tuning(1280, 2, 4), _ALL: Tuning(4096, 2, 3)},
}
"""By the bytes of a cached number, for batches of at most so many pairs of a sequence and a kv head (measured on an H200 with 8 kv
heads). A large batch fills the GPU without being cut."""

_PROGRAMS = 1024
"""Programs that a launch has where there are so many items, or one for each sequence and head if these are more. There may be
a hundred times as many items where contexts are long: most are not there, and a program that only finds this out costs as
long as reading a few pages."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the layers of a step share: who attends to what, in chunks."""

    tables: Tensor
    """[rows, blocks] int32: block tables."""
    first_S1: Tensor
    """int32, S + 1 of them: each sequence's first item, and how many there are."""
    items_M4: Tensor
    """int32, of each item: its sequence, that one's table row and length, and the item's number in it. All that a
    program must know before it can look up a page, in one place. M is the most there can be."""
    chunk: int
    """Most tokens of a chunk."""

    @property
    def num_sequences(self) -> int:
        return len(self.first_S1) - 1


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where chunks leave what they found. One for all layers of a step, which follow one another."""

    parts: Tensor
    """float32, [M, K, G, D], G rounded up to a power of two: what the chunk's own softmax gives."""
    sums: Tensor
    """float32, [M, K, G]: the logarithm to base 2 of that softmax's denominator."""
    counters: Tensor
    """int32, [S, K]: chunks done. Zero between two launches."""


def chunk_size(num_sequences: int, kv_heads: int, max_len: int, *, itemsize: int) -> int:
    """Most tokens of a chunk: few enough that a small batch fills the GPU, many enough that adding up the longest
    sequence's takes no longer than they do. `itemsize`: of the narrowest layer, in bytes; the others are cut alike."""
    return max(tuning(num_sequences, kv_heads, itemsize).chunk, triton.next_power_of_2(max_len // 256))


def tuning(num_sequences: int, kv_heads: int, itemsize: int) -> Tuning:
    """What `TUNING` has for such a batch."""
    by_pairs = TUNING[min(itemsize, 2)]
    return next(tuning for most, tuning in by_pairs.items() if num_sequences * kv_heads <= most)


def _tile(cache: KVCache, layer: int) -> int:
    """Keys taken at a time: in 8 bits never more than a page, and no more than leave room for the stages in shared memory."""
    kept = cache.layers[layer]
    most = 64 if kept.scales is None else min(64, cache.block_size)
    return min(most, max(16, _TILE_BYTES // (cache.shape.head_dim * kept.kv.itemsize)))


def _rows(group: int, *, is_narrow: bool) -> int:
    """Queries of a tile: rows of it where keys have 16 bits, columns where they have 8."""
    return max(8 if is_narrow else 16, triton.next_power_of_2(group))


def scratch(work: Work, *, heads: int, cache: KVCache) -> Scratch:
    """Room for these items and sequences."""
    items, sequences, kv_heads = len(work.items_M4), work.num_sequences, cache.shape.kv_heads
    group, device = triton.next_power_of_2(heads // kv_heads), cache.data.device
    return Scratch(
        torch.empty((items, kv_heads, group, cache.shape.head_dim), dtype=torch.float32, device=device),
        torch.empty((items, kv_heads, group), dtype=torch.float32, device=device),
        torch.zeros((sequences, kv_heads), dtype=torch.int32, device=device),
    )


def most_items(num_sequences: int, max_len: int, *, chunk: int) -> int:
    """Chunks of so many sequences that are no longer than that."""
    return num_sequences * -(-max_len // chunk)


def scratch_bytes(num_sequences: int, *, max_len: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Of a `Scratch` for so many sequences, at most, whatever keys are kept in: a group of heads is padded to less than twice
    its size."""
    chunk = min(chunk_size(num_sequences, kv_heads, max_len, itemsize=itemsize) for itemsize in TUNING)
    return 2 * most_items(num_sequences, max_len, chunk=chunk) * heads * (head_dim + 1) * 4


def plan(tables: Tensor, slots_S: Tensor, lengths_S: Tensor, *, chunk: int, most_items: int) -> Work:
    """Lists the chunks of these sequences."""
    num_sequences, device = len(slots_S), slots_S.device
    first_S1 = torch.empty(num_sequences + 1, dtype=torch.int32, device=device)
    items_M4 = torch.empty((most_items, 4), dtype=torch.int32, device=device)
    number_items[(1,)](lengths_S, first_S1, num_sequences, chunk, S=triton.next_power_of_2(num_sequences))
    _list_chunks[(num_sequences,)](first_S1, slots_S, lengths_S, items_M4, B=64, num_warps=1)
    return Work(tables, first_S1, items_M4, chunk)


def attend(
    q_NHD: Tensor,
    out_NHD: Tensor,
    cache: KVCache,
    layer: int,
    work: Work,
    scratch: Scratch,
    *,
    scale: float,
    window: int | None,
) -> None:
    """As `ops.attention.paged_attention` for the first S rows, one query token of each sequence; writes those of
    `out_NHD`."""
    num_sequences, (_, heads, head_dim) = work.num_sequences, q_NHD.shape
    kv_heads = cache.shape.kv_heads
    kv, scales = cache.layers[layer].kv, cache.layers[layer].scales
    _, warps, stages = tuning(num_sequences, kv_heads, kv.itemsize)
    most_items = len(work.items_M4)
    programs = min(most_items, max(num_sequences, _PROGRAMS // kv_heads))
    _attend_decodes[(programs, kv_heads)](
        q_NHD,
        kv,
        scales,
        out_NHD,
        work.tables,
        work.first_S1,
        work.items_M4,
        scratch.parts,
        scratch.sums,
        scratch.counters,
        scale * LOG2_E,
        num_sequences,
        work.chunk,
        work.tables.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        None if scales is None else scales.stride(0),
        G=heads // kv_heads,
        K=kv_heads,
        D=head_dim,
        WIDTH=max(16, triton.next_power_of_2(head_dim)),
        ROWS=_rows(heads // kv_heads, is_narrow=scales is not None),
        T=cache.block_size,
        TILE=_tile(cache, layer),
        WINDOW=window or 0,
        GROUP=scratch.parts.shape[2],
        PARTS=8,
        PRECISION="ieee" if q_NHD.dtype is torch.float32 else "tf32",
        ONE_EACH=programs == most_items,
        num_warps=warps,
        num_stages=stages,
        **overlapped(q_NHD),
    )


@triton.jit
def number_items(lengths, first, num_sequences, chunk, S: tl.constexpr):
    """How many items of a chunk each stand before those of each sequence, and how many there are."""
    row = tl.arange(0, S)
    length = tl.load(lengths + row, mask=row < num_sequences, other=0)
    ends = tl.cumsum(tl.cdiv(length, chunk), 0)
    tl.store(first + 1 + row, ends, mask=row < num_sequences)
    tl.store(first, 0)


@triton.jit
def _list_chunks(first, slots, lengths, items, B: tl.constexpr):
    sequence = tl.program_id(0)
    start, end = tl.load(first + sequence), tl.load(first + sequence + 1)
    slot, length = tl.load(slots + sequence).to(tl.int32), tl.load(lengths + sequence)
    for at in range(start, end, B):
        item = at + tl.arange(0, B)
        inside = item < end
        tl.store(items + item * 4, tl.zeros((B,), tl.int32) + sequence, mask=inside)
        tl.store(items + item * 4 + 1, tl.zeros((B,), tl.int32) + slot, mask=inside)
        tl.store(items + item * 4 + 2, tl.zeros((B,), tl.int32) + length, mask=inside)
        tl.store(items + item * 4 + 3, item - start, mask=inside)


@triton.jit
def _attend_decodes(
    q,
    kv,
    scales,
    out,
    tables,
    first,
    items,
    parts,
    sums,
    counters,
    scale,
    num_sequences,
    chunk,
    table_stride,
    block_stride,
    v_stride,
    head_stride,
    scale_stride,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_EACH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One item, or as many as fall to this program."""
    item, head = tl.program_id(0), tl.program_id(1)
    num_items = tl.load(first + num_sequences)
    if ONE_EACH:
        if item >= num_items:
            wait(OVERLAP)
            return
        _attend_item(
            item, head, q, kv, scales, out, tables, items, parts, sums, counters, scale, chunk, table_stride,
            block_stride, v_stride, head_stride, scale_stride, G, K, D, WIDTH, ROWS, T, TILE, WINDOW, GROUP, PARTS,
            PRECISION, OVERLAP,
        )  # fmt: skip
    else:
        wait(OVERLAP)
        # What does not change from item to item is computed again: kept, it would not fit into the registers.
        for at in tl.range(item, num_items, tl.num_programs(0), disable_licm=True):
            _attend_item(
                tl.cast(at, tl.int32), head, q, kv, scales, out, tables, items, parts, sums, counters, scale, chunk, table_stride,
                block_stride, v_stride, head_stride, scale_stride, G, K, D, WIDTH, ROWS, T, TILE, WINDOW, GROUP, PARTS,
                PRECISION, False,
            )  # fmt: skip


@triton.jit
def _attend_item(
    item,
    head,
    q,
    kv,
    scales,
    out,
    tables,
    items,
    parts,
    sums,
    counters,
    scale,
    chunk,
    table_stride,
    block_stride,
    v_stride,
    head_stride,
    scale_stride,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What one chunk gives the heads that share a kv head. The list of items and the tables are made before the layers, so that they may
    be read before the kernel is done that writes the newest keys."""
    sequence, slot = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
    length, number = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
    num_chunks = tl.cdiv(length, chunk)
    table = tables + slot.to(tl.int64) * table_stride
    chunk_tiles = tl.cdiv(tl.cdiv(length, TILE), num_chunks)
    start = number * chunk_tiles * TILE
    end = tl.minimum(start + chunk_tiles * TILE, length)

    if WINDOW > 0:
        start = tl.maximum(start, (tl.maximum(length - WINDOW, 0) // TILE) * TILE)
    block = tl.load(table + start // T)
    wait(OVERLAP)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, WIDTH)
    held = (row < G)[:, None] & (place < D)[None, :]
    at = (sequence.to(tl.int64) * K * G + head * G + row)[:, None] * D + place[None, :]
    queries = tl.load(q + at, mask=held, other=0.0)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if scales is None:
        found = tl.zeros((ROWS, WIDTH), tl.float32)
    else:
        found = tl.zeros((WIDTH, ROWS), tl.float32)
        queries, largest = kv_quant.normed(queries)
        queries, query_scale = queries.T, largest * scale
    if scales is not None:
        # Nothing behind the end but scales must be hidden.
        for tile in range(start, end, TILE):
            token = tile + tl.arange(0, TILE)
            seen = token < end
            if WINDOW > 0:
                seen = seen & (token >= length - WINDOW)
            inside = tl.multiple_of(tile % T, TILE) + tl.arange(0, TILE)
            keys, values, key_scales, value_scales = kv_quant.load_tile(
                kv, scales, block, inside, seen, head, place, block_stride, v_stride, head_stride, scale_stride,
                K, D, T, WIDTH,
            )  # fmt: skip
            block = tl.load(table + (tile + TILE) // T, mask=tile + TILE < end, other=0)
            peak, total, found = kv_quant.take_in(
                queries, keys, values, key_scales, value_scales, seen, peak, total, found, query_scale, False, PRECISION, 0,
            )  # fmt: skip
    else:
        # Tiles that are seen as a whole, and then the one at the end; in a window all are taken for such.
        whole = start if WINDOW > 0 else start + (end - start) // TILE * TILE
        for tile in range(start, whole, TILE):
            keys, values = _load_tile(
                kv, table, block, tile, end, 0, head, place, block_stride, v_stride, head_stride, D, T, TILE, WIDTH, False
            )  # fmt: skip
            if TILE <= T:
                # Looked up one tile ahead, so that the loads need not wait for it.
                block = tl.load(table + (tile + TILE) // T, mask=tile + TILE < end, other=0)
            scores = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
            peak, total, weights, fade = softmax.take_in(scores, scores, peak, total, False)
            found = found * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        for tile in range(whole, end, TILE):
            begin = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
            token = tile + tl.arange(0, TILE)
            keys, values = _load_tile(
                kv, table, block, tile, end, begin, head, place, block_stride, v_stride, head_stride, D, T, TILE, WIDTH, True
            )  # fmt: skip
            if TILE <= T:
                block = tl.load(table + (tile + TILE) // T, mask=tile + TILE < end, other=0)
            scores = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
            seen = (token < end) & (token >= begin)
            peak, total, weights, fade = softmax.take_in(scores, seen[None, :], peak, total, True)
            found = found * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    if scales is not None:
        found = found.T
    if num_chunks == 1:
        tl.store(out + at, found / total[:, None], mask=held)
    else:
        # Each chunk leaves its part, and the last one to do so adds them up.
        part = (item.to(tl.int64) * K + head) * GROUP + row
        share = tl.where(total > 0, total, 1.0)
        tl.store(parts + part[:, None] * D + place[None, :], found / share[:, None], mask=held)
        tl.store(sums + part, tl.where(total > 0, peak + tl.log2(share), -1e30), mask=row < G)
        tl.debug_barrier()
        counter = counters + sequence * K + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_chunks - 1:
            tl.store(counter, 0)
            to = out + (sequence.to(tl.int64) * K + head) * G * D
            _add_up(to, parts, sums, item - number, item - number + num_chunks, head, K, G, D, WIDTH, GROUP, PARTS)


@triton.jit
def _load_tile(
    kv,
    table,
    block,
    tile,
    end,
    begin,
    head,
    place,
    block_stride,
    v_stride,
    head_stride,
    D: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    SOME_HIDDEN: tl.constexpr,
):
    """Keys and values of the tokens from `tile` on, in this block where it holds all of them; zeros for tokens before `begin` and from
    `end` on, where some are."""
    token = tile + tl.arange(0, TILE)
    if TILE <= T:
        base = block.to(tl.int64) * block_stride + head * head_stride
        base += (tl.multiple_of(tile % T, TILE) + tl.arange(0, TILE)) * D
    else:
        blocks = tl.load(table + token // T, mask=token < end, other=0).to(tl.int64)
        base = blocks * block_stride + head * head_stride + (token % T) * D
    of_keys = kv + base[:, None] + place[None, :]
    if SOME_HIDDEN:
        there = ((token < end) & (token >= begin))[:, None] & (place < D)[None, :]
        keys, values = tl.load(of_keys, mask=there, other=0.0), tl.load(of_keys + v_stride, mask=there, other=0.0)
    elif WIDTH != D:
        there = place[None, :] < D
        keys, values = tl.load(of_keys, mask=there, other=0.0), tl.load(of_keys + v_stride, mask=there, other=0.0)
    else:
        keys, values = tl.load(of_keys), tl.load(of_keys + v_stride)
    return keys, values


@triton.jit
def _add_up(
    out,
    parts,
    sums,
    begin,
    until,
    head,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """PARTS of them at a time."""
    row, place = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    held = (row < G)[:, None] & (place < D)[None, :]
    peak = tl.full((GROUP,), -1e30, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, WIDTH), tl.float32)
    for at in range(begin, until, PARTS):
        item = at + tl.arange(0, PARTS)
        there = item < until
        part = (item.to(tl.int64)[:, None] * K + head) * GROUP + row[None, :]
        here = tl.load(sums + part, mask=there[:, None] & (row < G)[None, :], other=-1e30)
        values = tl.load(
            parts + part[:, :, None] * D + place[None, None, :], mask=there[:, None, None] & held[None], other=0.0
        )
        higher = tl.maximum(peak, tl.max(here, 0))
        fade, share = tl.exp2(peak - higher), tl.exp2(here - higher[None, :])
        found = found * fade[:, None] + tl.sum(values * share[:, :, None], 0)
        total = total * fade + tl.sum(share, 0)
        peak = higher
    tl.store(out + row[:, None] * D + place[None, :], found / tl.where(total > 0, total, 1.0)[:, None], mask=held)
