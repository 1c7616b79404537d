"""Paged attention against its definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.kv_cache import KVCache, KVShape
from services.engine.kv_format import KVFormat
from services.engine.ops.attention import paged_attention, plan
from tests.engine.batches import Chunk, batch_of, fill

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 8


def filled_cache(
    *, dtype: torch.dtype = torch.float32, num_blocks: int = 96, block_size: int = 4, format: KVFormat = KVFormat.AUTO
) -> KVCache:
    """A cache of two layers full of noise, the second in this format."""
    shape = KVShape(layers=2, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    cache = KVCache(shape, num_blocks=num_blocks, block_size=block_size, formats=(KVFormat.AUTO, format))
    fill(cache)
    return cache


def chunks_of(lengths: list[tuple[int, int]], *, cache: KVCache) -> list[Chunk]:
    """Chunks of (tokens before, tokens computed), one token each first, with blocks handed out backwards."""
    free = itertools.count(cache.num_blocks - 1, -1)
    tables = [[next(free) for _ in range(-(-(start + count) // cache.block_size))] for start, count in lengths]
    chunks = [Chunk([0] * count, start, table) for (start, count), table in zip(lengths, tables, strict=True)]
    return sorted(chunks, key=lambda chunk: len(chunk.token_ids) > 1)


def definition(
    q_NHD: Tensor,
    cache: KVCache,
    layer: int,
    chunks: list[Chunk],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention by its formula, one query token and head at a time, in float64."""
    rows = []
    queries = iter(q_NHD.double())
    for chunk in chunks:
        keys, values = (
            x.double().transpose(1, 2).flatten(0, 1) for x in cache.layers[layer].read(torch.tensor(chunk.table))
        )
        for position in range(chunk.start, chunk.end):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            query = next(queries)
            heads = []
            for head in range(query.shape[0]):
                scores = keys[seen, head // GROUP] @ query[head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks_H is None else sinks_H[head].double().exp())
                heads.append(weights / total @ values[seen, head // GROUP])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


lengths = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 5, 17])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths,
    window=st.sampled_from([None, 1, 3, 8, 100]),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    format=st.sampled_from(KVFormat),
)
def test_it_computes_what_the_definition_says(
    lengths: list[tuple[int, int]], window: int | None, softcap: float | None, with_sinks: bool, format: KVFormat
) -> None:
    """Any mix of decode rows and chunks, with any window, cap and sinks, agrees with float64 on what the cache holds."""
    cache = filled_cache(format=format)
    chunks = chunks_of(lengths, cache=cache)
    batch = batch_of(*chunks, block_size=cache.block_size)
    generator = torch.Generator().manual_seed(len(lengths))
    q_NHD = torch.randn((len(batch.token_ids_N), KV_HEADS * GROUP, HEAD_DIM), generator=generator)
    sinks_H = torch.randn(KV_HEADS * GROUP, generator=generator) if with_sinks else None
    options = {"scale": HEAD_DIM**-0.5, "window": window, "softcap": softcap, "sinks_H": sinks_H}
    for layer in range(2):
        out = paged_attention(q_NHD, cache, layer, plan(batch, cache), **options)
        torch.testing.assert_close(out.double(), definition(q_NHD, cache, layer, chunks, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", KVFormat)
@pytest.mark.parametrize("lengths", [[(0, 3)], [(1, 3)], [(20, 3)], [(2, 1)]])
def test_heads_of_a_token_lie_side_by_side(lengths: list[tuple[int, int]], format: KVFormat) -> None:
    """As the product behind attention takes them, whether a chunk begins a sequence, stays in its block or does not."""
    cache = filled_cache(format=format)
    batch = batch_of(*chunks_of(lengths, cache=cache), block_size=cache.block_size)
    q_NHD = torch.randn((len(batch.token_ids_N), KV_HEADS * GROUP, HEAD_DIM))
    out = paged_attention(q_NHD, cache, 1, plan(batch, cache), scale=0.3)
    assert out.view(len(out), -1).shape[1] == KV_HEADS * GROUP * HEAD_DIM


def test_decode_rows_of_unlike_length_do_not_pad_one_another_without_bound() -> None:
    """A row of 2 blocks and one of 90 are gathered apart, so that padding at most doubles what is read."""
    cache = filled_cache(num_blocks=128)
    batch = batch_of(*chunks_of([(359, 1), (6, 1), (5, 1)], cache=cache), block_size=cache.block_size)
    groups = plan(batch, cache).groups(None)
    assert sorted((group.num_sequences, group.num_keys) for group in groups) == [(1, 360), (2, 7)]


def test_a_window_reads_its_blocks_alone() -> None:
    """Where a window hides the beginning of a long sequence, the blocks there are not gathered."""
    cache = filled_cache(num_blocks=128)
    batch = batch_of(*chunks_of([(399, 1)], cache=cache), block_size=cache.block_size)
    (group,) = plan(batch, cache).groups(10)
    keys, _ = group.gather(cache, 0)
    assert keys.shape[2] <= 10 + cache.block_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding_alone(dtype: torch.dtype) -> None:
    """In 16 bits the result is within rounding of the definition on the same values."""
    cache = filled_cache(dtype=dtype)
    chunks = chunks_of([(30, 1), (11, 9)], cache=cache)
    batch = batch_of(*chunks, block_size=cache.block_size)
    q_NHD = torch.randn((10, KV_HEADS * GROUP, HEAD_DIM), generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"scale": HEAD_DIM**-0.5, "window": None, "softcap": None, "sinks_H": None}
    out = paged_attention(q_NHD, cache, 0, plan(batch, cache), **options)
    assert out.dtype is dtype
    expected = definition(q_NHD, cache, 0, chunks, **options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_long_chunks_are_worked_off_in_tiles() -> None:
    """A chunk longer than a tile of the plain form gives what its parts give."""
    cache = filled_cache(block_size=32)
    (chunk,) = chunks_of([(0, 600)], cache=cache)
    batch = batch_of(chunk, block_size=cache.block_size)
    q_NHD = torch.randn((600, KV_HEADS * GROUP, HEAD_DIM), generator=torch.Generator().manual_seed(2))
    capped = paged_attention(q_NHD, cache, 0, plan(batch, cache), scale=1 / math.sqrt(HEAD_DIM), softcap=1e6)
    plain = paged_attention(q_NHD, cache, 0, plan(batch, cache), scale=1 / math.sqrt(HEAD_DIM))
    torch.testing.assert_close(capped, plain, rtol=0, atol=1e-4)
