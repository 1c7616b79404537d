"""Pages of 8 bits as pages of 16, for the chunks of prompts that see them.

Every tile of a chunk's queries takes the chunk's pages anew, and in 8 bits it is the widening that takes its time. A chunk of enough tokens has
its pages widened once a layer instead: into a scratch that all layers share, one page after the other, as a layer in 16 bits keeps
them. Which chunks do is found out on the device, once a step.

Shapes: P works, W pages of the scratch, K kv heads, D head size, T tokens of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels import kv_quant
from services.engine.ops.kernels.bits import widened
from services.engine.ops.kernels.overlap import overlapped, wait

FEWEST = 256
"""Tokens of a chunk whose pages are widened. By what prompts of 2,048 tokens took on an H200 (8 kv heads of 128), a key read in 8 bits costs
each token that sees it some 25 ps more than one in 16; to widen it should take 2 ns, by the bytes that are moved. So 80 tokens must see
it, however long the context is, and one of a prompt is seen by half of them. The rest is for the launch."""

REACH = 4
"""How many tokens there is room for, by those of a step: one of 8,192 may widen 32,768, of a Llama-3.1-8B 128 MiB. What has no room is read in
8 bits."""

_PROGRAMS = 512
"""That a launch has at most, so that an H200 runs all at a time: a step may have nothing to widen. Each takes as many pages as fall to it."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages that the chunks of a step see, and where a layer's are widened."""

    first_P1: Tensor
    """int32, P + 1 of them: each work's first page in the scratch, -1 where its pages are not there; and how many there are."""
    blocks_W: Tensor
    """int32: the block that each is of."""
    order_W: Tensor
    """int32, 0 to W - 1: the block table of the scratch."""
    wide: Tensor
    """[W, 2, K, T * D]: keys, then values, by token."""


def plan(
    tables: Tensor,
    rows_P: Tensor,
    lengths_P: Tensor,
    counts_P: Tensor,
    *,
    most_tokens: int,
    cache: KVCache,
    dtype: torch.dtype,
) -> Pages | None:
    """Lists the pages of works that have `FEWEST` of their `counts_P` tokens (int32) or more, in their order, as long as there is room. Works see
    `lengths_P` keys and have `most_tokens` together at most: None where these are too few."""
    if most_tokens < FEWEST:
        return None
    size, device, num_works = cache.block_size, tables.device, len(rows_P)
    room = triton.cdiv(REACH * most_tokens, size)
    first_P1 = torch.empty(num_works + 1, dtype=torch.int32, device=device)
    blocks_W = torch.empty(room, dtype=torch.int32, device=device)
    wide = torch.empty((room, 2, cache.shape.kv_heads, size * cache.shape.head_dim), dtype=dtype, device=device)
    _number[(1,)](
        lengths_P, counts_P, first_P1, num_works, room, FEWEST, T=size, S=triton.next_power_of_2(num_works)
    )  # fmt: skip
    _list_pages[(num_works,)](
        tables, rows_P, lengths_P, first_P1, blocks_W, tables.stride(0), T=size, B=64, num_warps=1
    )
    return Pages(first_P1, blocks_W, torch.arange(room, dtype=torch.int32, device=device), wide)


def widen(cache: KVCache, layer: int, pages: Pages) -> None:
    """Fills the scratch with what this layer, one in 8 bits, keeps in the pages listed: products with the scales, rounded once."""
    kv, scales, (_, _, kv_heads, _) = cache.layers[layer].kv, cache.layers[layer].scales, pages.wide.shape
    assert scales is not None
    head_dim = cache.shape.head_dim
    _widen_pages[(min(len(pages.wide), triton.cdiv(_PROGRAMS, kv_heads)), kv_heads)](
        kv, scales, pages.first_P1, pages.blocks_W, pages.wide, len(pages.first_P1) - 1,
        kv.stride(0), kv.stride(1), kv.stride(2), scales.stride(0),
        K=kv_heads, D=head_dim, T=cache.block_size, WIDTH=triton.next_power_of_2(head_dim), num_warps=4, **overlapped(kv),
    )  # fmt: skip


@triton.jit
def _number(lengths, counts, first, num_works, room, fewest, T: tl.constexpr, S: tl.constexpr):
    work = tl.arange(0, S)
    there = work < num_works
    length, count = tl.load(lengths + work, mask=there, other=0), tl.load(counts + work, mask=there, other=0)
    wanted = tl.where(count >= fewest, tl.cdiv(length, T), 0)
    ends = tl.cumsum(wanted, 0)
    fits = (wanted > 0) & (ends <= room)
    tl.store(first + work, tl.where(fits, ends - wanted, -1), mask=there)
    tl.store(first + num_works, tl.max(tl.where(fits, ends, 0), 0))


@triton.jit
def _list_pages(tables, slots, lengths, first, blocks, table_stride, T: tl.constexpr, B: tl.constexpr):
    work = tl.program_id(0)
    to = tl.load(first + work)
    if to >= 0:
        table = tables + tl.load(slots + work).to(tl.int64) * table_stride
        count = tl.cdiv(tl.load(lengths + work), T)
        for at in range(0, count, B):
            page = at + tl.arange(0, B)
            inside = page < count
            tl.store(blocks + to + page, tl.load(table + page, mask=inside, other=0), mask=inside)


@triton.jit
def _widen_pages(
    kv, scales, first, blocks, wide, num_works, block_stride, v_stride, head_stride, scale_stride,
    K: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    wait(OVERLAP)
    token, place = tl.arange(0, T), tl.arange(0, WIDTH)
    for page in range(tl.program_id(0), tl.load(first + num_works), tl.num_programs(0)):
        keys, values, key_scales, value_scales = kv_quant.load_tile(
            kv, scales, tl.load(blocks + page), token, None, head, place, block_stride, v_stride, head_stride, scale_stride,
            K, D, T, WIDTH,
        )  # fmt: skip
        keys = widened(keys, tl.float32) * key_scales[:, None]
        values = widened(values, tl.float32) * value_scales[None, :]
        to = wide + (tl.cast(page, tl.int64) * 2 * K + head) * T * D + token[:, None] * D + place[None, :]
        held = None if WIDTH == D else place[None, :] < D
        tl.store(to, keys.to(wide.dtype.element_ty), mask=held)
        tl.store(to + K * T * D, values.to(wide.dtype.element_ty).T, mask=held)
