"""Paged attention of decodes and of chunks, by the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kv_cache import KVCache, KVShape
from services.engine.ops.attention import paged_attention, plan
from services.engine.ops.kernels import decode_attention
from services.engine.ops.kernels.attention import PagedPlan
from tests.engine.batches import Chunk, batch_of, fill

# Triton's interpreter takes the number out of an array of one.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SHAPES = [(9, 3, 64, 32), (8, 4, 8, 16), (4, 2, 128, 64), (20, 1, 24, 16)]


def filled_cache(kv_heads: int, head_dim: int, block_size: int) -> KVCache:
    """A cache full of noise."""
    cache = KVCache(KVShape(2, kv_heads, head_dim, torch.float32), num_blocks=80, block_size=block_size)
    fill(cache)
    return cache


def chunks(lengths: list[tuple[int, int]], *, block_size: int) -> list[Chunk]:
    """Chunks of (tokens before, tokens computed), each with blocks of its own, in no order."""
    free = iter(torch.randperm(80, generator=torch.Generator().manual_seed(2)).tolist())
    tables = [[next(free) for _ in range(-(-sum(each) // block_size))] for each in lengths]
    return [Chunk([0] * count, start, table) for (start, count), table in zip(lengths, tables, strict=True)]


def attended(
    lengths: list[tuple[int, int]], shape: tuple[int, int, int, int], window: int | None
) -> tuple[Tensor, Tensor]:
    """What the kernels and what the specification give."""
    heads, kv_heads, head_dim, block_size = shape
    cache = filled_cache(kv_heads, head_dim, block_size)
    batch = batch_of(*chunks(lengths, block_size=block_size), block_size=block_size)
    q = torch.randn(len(batch.token_ids_N), heads, head_dim, generator=torch.Generator().manual_seed(1))
    mine = PagedPlan(batch).attend(q, cache, 1, scale=0.2, window=window)
    return mine, paged_attention(q, cache, 1, plan(batch, cache), scale=0.2, window=window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_decodes_see_all_their_keys(shape: tuple[int, int, int, int], window: int | None) -> None:
    """Sequences of one token, of a tile, of one more, and of several chunks."""
    mine, expected = attended([(0, 1), (62, 1), (63, 1), (64, 1), (199, 1), (129, 1)], shape, window)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_prompts_see_what_lies_before_them(shape: tuple[int, int, int, int], window: int | None) -> None:
    """Whole prompts and later chunks, beside a decode."""
    mine, expected = attended([(50, 1), (0, 40), (193, 7), (0, 130), (31, 2)], shape, window)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_a_plan_lists_every_chunk_once() -> None:
    """In the order of the sequences, the longest with the most."""
    lengths = torch.tensor([1, 64, 65, 300], dtype=torch.int32)
    tables = torch.zeros((4, 20), dtype=torch.int32)
    work = decode_attention.plan(tables, torch.arange(4), lengths, chunk=64, most_items=99)
    assert work.first_S1.tolist() == [0, 1, 2, 4, 9]
    assert work.items_M4[:9, 0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 3]
    assert work.items_M4[:9, 3].tolist() == [0, 0, 0, 1, 0, 1, 2, 3, 4]


def test_chunks_added_up_are_the_whole() -> None:
    """Cut in 1, 2 or 5 pieces the result is the same, and the counters are ready for the next layer."""
    cache = filled_cache(2, 64, 32)
    q, slots = torch.randn(2, 6, 64), torch.arange(2)
    tables = torch.arange(20, dtype=torch.int32).view(2, 10)
    lengths = torch.tensor([300, 290], dtype=torch.int32)
    found = []
    for chunk in (64, 256, 512):
        out = torch.empty_like(q)
        work = decode_attention.plan(tables, slots, lengths, chunk=chunk, most_items=2 * -(-320 // chunk))
        scratch = decode_attention.scratch(work, heads=6, cache=cache)
        decode_attention.attend(q, out, cache, 0, work, scratch, scale=0.1, window=None)
        assert not scratch.counters.any()
        found.append(out)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=1e-5)
