"""Paged attention of decodes and of chunks, by the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kv_cache import KVCache, KVShape
from services.engine.kv_format import KVFormat
from services.engine.ops.attention import paged_attention, plan
from services.engine.ops.kernels import decode_attention, pages
from services.engine.ops.kernels.attention import PagedPlan
from tests.engine.batches import Chunk, batch_of, fill

# Triton's interpreter takes the number out of an array of one.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SHAPES = [(9, 3, 64, 32), (8, 4, 8, 16), (4, 2, 128, 64), (20, 1, 24, 16)]


def filled_cache(
    kv_heads: int, head_dim: int, block_size: int, format: KVFormat = KVFormat.AUTO, dtype: torch.dtype = torch.float32
) -> KVCache:
    """A cache full of noise, its second layer in this format."""
    shape, formats = KVShape(2, kv_heads, head_dim, dtype), (KVFormat.AUTO, format)
    cache = KVCache(shape, num_blocks=80, block_size=block_size, formats=formats)
    fill(cache)
    return cache


def chunks(lengths: list[tuple[int, int]], *, block_size: int) -> list[Chunk]:
    """Chunks of (tokens before, tokens computed), each with blocks of its own, in no order."""
    free = iter(torch.randperm(80, generator=torch.Generator().manual_seed(2)).tolist())
    tables = [[next(free) for _ in range(-(-sum(each) // block_size))] for each in lengths]
    return [Chunk([0] * count, start, table) for (start, count), table in zip(lengths, tables, strict=True)]


def attended(
    lengths: list[tuple[int, int]],
    shape: tuple[int, int, int, int],
    window: int | None,
    format: KVFormat = KVFormat.AUTO,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What the kernels and what the specification give."""
    heads, kv_heads, head_dim, block_size = shape
    cache = filled_cache(kv_heads, head_dim, block_size, format, dtype)
    batch = batch_of(*chunks(lengths, block_size=block_size), block_size=block_size)
    q = torch.randn(len(batch.token_ids_N), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = PagedPlan(batch, cache).attend(q, cache, 1, scale=0.2, window=window)
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


def test_a_program_takes_items_as_long_as_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where contexts may be long, a launch has fewer programs than there could be items: none is left."""
    monkeypatch.setattr(decode_attention, "_PROGRAMS", 4)
    mine, expected = attended([(700, 1), (199, 1), (0, 1), (450, 1)], (9, 3, 64, 64), None)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


EIGHT_BITS = [KVFormat.FP8_E4M3, KVFormat.INT8]
DECODES = [(0, 1), (62, 1), (63, 1), (64, 1), (199, 1), (129, 1)]
CHUNKS = [(50, 1), (0, 70), (126, 7), (31, 2)]


@pytest.mark.parametrize(("shape", "window"), [((9, 3, 64, 64), None), ((5, 1, 24, 32), 40)])
@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "chunks"])
def test_in_8_bits_they_see_the_same(
    lengths: list[tuple[int, int]], format: KVFormat, shape: tuple[int, int, int, int], window: int | None
) -> None:
    """Computed in float32, the kernels differ from the specification by rounding alone."""
    mine, expected = attended(lengths, shape, window, format)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decodes", "chunks"])
def test_in_8_bits_16_are_enough_to_multiply(
    lengths: list[tuple[int, int]], format: KVFormat, dtype: torch.dtype
) -> None:
    """Products are of float16, whatever the model's dtype: the result is within its rounding, or bfloat16's."""
    mine, expected = attended(lengths, (8, 2, 64, 64), None, format, dtype)
    torch.testing.assert_close(mine, expected, atol=4 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_keys_and_values_of_any_size_fit_16_bits(format: KVFormat, size: float) -> None:
    """Queries, keys and values far outside of float16, and values that differ a thousand times from one token to
    another: what counts is their proportion."""
    slots = torch.randperm(80 * 64)
    kv_N2KD = torch.randn(80 * 64, 2, 2, 64) * torch.logspace(-1.5, 1.5, 80 * 64)[:, None, None, None]
    kv_N2KD[:, 0] /= size  # so that scores stay what they are
    kv_N2KD[:, 1] *= size
    halves, floats = (filled_cache(2, 64, 64, format, dtype) for dtype in (torch.bfloat16, torch.float32))
    for cache in (halves, floats):
        cache.write(1, kv_N2KD, cache.locate(slots))
    batch = batch_of(*chunks([(300, 1), (70, 20)], block_size=64), block_size=64)
    q = (torch.randn(21, 8, 64) * size).bfloat16()
    mine = PagedPlan(batch, halves).attend(q, halves, 1, scale=0.02, window=None).float()
    expected = paged_attention(q.float(), floats, 1, plan(batch, floats), scale=0.02)
    assert ((mine - expected).norm(dim=-1) <= 0.01 * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_what_is_no_number_spoils_those_alone_that_see_it(format: KVFormat, part: int) -> None:
    """The sequences that a NaN key or value is of, and not the one behind whose end it lies."""
    cache = filled_cache(2, 64, 64, format)
    lengths = [(69, 1), (9, 1), (0, 66)]
    works = chunks(lengths, block_size=64)
    spoiled = torch.randn(3, 2, 2, 64)
    spoiled[:, part] = torch.nan
    at = [works[0].table[0] * 64 + 5, works[1].table[0] * 64 + 10, works[2].table[0] * 64 + 30]
    cache.write(1, spoiled, cache.locate(torch.tensor(at)))
    batch = batch_of(*works, block_size=64)
    out = PagedPlan(batch, cache).attend(torch.randn(68, 8, 64), cache, 1, scale=0.2, window=None)
    assert out[0].isnan().all() and out[1].isfinite().all() and out[32:].isnan().all()


MIXED = [(50, 1), (0, 70), (126, 7), (140, 66), (33, 64)]
"""A decode, a chunk of few tokens, and three of enough: of 2, 4 and 2 pages of 64."""


@pytest.mark.parametrize(("reach", "first"), [(4, [0, -1, 2, 6, 8]), (2, [0, -1, 2, -1, 6]), (1, [0, -1, -1, -1, 2])])
@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(8, 2, 64, 64), (5, 1, 24, 64)])
def test_chunks_of_many_tokens_see_their_pages_widened(
    shape: tuple[int, int, int, int],
    format: KVFormat,
    reach: int,
    first: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those for which there is room, in order; the others read 8 bits. Either way they find what they should; in float16, of
    which the interpreter takes products as a GPU does."""
    monkeypatch.setattr(pages, "FEWEST", 64)
    monkeypatch.setattr(pages, "REACH", reach)
    heads, kv_heads, head_dim, block_size = shape
    cache = filled_cache(kv_heads, head_dim, block_size, format, torch.float16)
    batch = batch_of(*chunks(MIXED, block_size=block_size), block_size=block_size)
    q = torch.randn(len(batch.token_ids_N), heads, head_dim).half()
    mine, expected = PagedPlan(batch, cache), plan(batch, cache)
    for layer in (1, 0, 1):  # in 8 bits, in 16, and in 8 again
        found = mine.attend(q, cache, layer, scale=0.2, window=None)
        wanted = paged_attention(q, cache, layer, expected, scale=0.2)
        torch.testing.assert_close(found, wanted, atol=4 * torch.finfo(torch.float16).eps, rtol=0)
    assert mine._pages is not None and mine._pages.first_P1.tolist() == first


@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(8, 2, 64, 64), (5, 1, 24, 32)])
def test_pages_are_widened_to_what_they_stand_for(
    shape: tuple[int, int, int, int], format: KVFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; where there are more pages than programs too."""
    monkeypatch.setattr(pages, "_PROGRAMS", 4)
    _, kv_heads, head_dim, block_size = shape
    cache = filled_cache(kv_heads, head_dim, block_size, format, torch.float16)
    tables = torch.randperm(80, dtype=torch.int32).view(4, 20)
    lengths, counts = (torch.tensor(each, dtype=torch.int32) for each in ([400, 300, 257, 9], [300, 255, 256, 0]))
    found = pages.plan(
        tables, torch.tensor([2, 0, 3, 1]), lengths, counts, most_tokens=811, cache=cache, dtype=torch.float16
    )
    assert found is not None
    first, second = (-(-length // block_size) for length in (400, 257))
    assert found.first_P1.tolist() == [0, -1, first, -1, first + second]
    pages.widen(cache, 1, found)
    blocks = torch.cat((tables[2, :first], tables[3, :second]))
    for got, wanted in zip(found.wide[: first + second].unbind(1), cache.layers[1].read(blocks), strict=True):
        assert torch.equal(got.view(wanted.shape), wanted)


@pytest.mark.parametrize(
    ("dtype", "window", "invariant"),
    [(torch.float32, None, False), (torch.float16, 40, False), (torch.float16, None, True)],
    ids=["float32", "window", "deterministic"],
)
def test_some_never_see_pages_widened(
    dtype: torch.dtype, window: int | None, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of more than 16 bits, layers with a window, and whoever must not notice what is computed beside."""
    monkeypatch.setattr(pages, "widen", None)
    monkeypatch.setattr(pages, "FEWEST", 64)
    cache = filled_cache(2, 64, 64, KVFormat.INT8, dtype)
    batch = batch_of(*chunks([(0, 1), (0, 70)], block_size=64), block_size=64)
    q = torch.randn(71, 4, 64, dtype=dtype)
    found = PagedPlan(batch, cache, invariant=invariant).attend(q, cache, 1, scale=0.2, window=window)
    wanted = paged_attention(q, cache, 1, plan(batch, cache), scale=0.2, window=window)
    torch.testing.assert_close(found, wanted, atol=4 * torch.finfo(torch.bfloat16).eps, rtol=0)


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
