"""The kernels on a GPU against their definitions in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kv_cache import KVCache, KVLayer, KVShape
from services.engine.kv_format import KVFormat
from services.engine.layers.linear import Linear
from services.engine.ops import moe
from services.engine.ops.activation import silu_mul
from services.engine.ops.attention import AttentionPlan, paged_attention, plan
from services.engine.ops.forms import Unsummed
from services.engine.ops.kernels import scaled
from services.engine.ops.kernels.attention import Works
from services.engine.ops.linear import counters_for, linear, products
from services.engine.ops.moe import Experts
from services.engine.ops.norm import rms_norm, rms_norm_of_sum
from services.engine.quant.rules import FORMATS
from services.engine.sampler import TorchSampler
from services.engine.sequence import Sequence, StopRules
from services.engine.shard import Shard
from services.engine.state import Batch, Selection
from services.engine.weight_format import WeightFormat
from tests.engine.batches import fill
from tests.engine.slots import admitted, sequence

SHAPES = [(32, 8, 128, 64, None), (16, 8, 128, 32, None), (9, 3, 64, 16, None), (8, 4, 8, 32, 40)]
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", ERRORS)
def test_norm_and_gate(dtype: torch.dtype) -> None:
    """Of a real model's widths, to a rounding of the dtype."""
    x, weight = torch.randn(50, 4096, dtype=dtype, device="cuda"), torch.randn(4096, dtype=dtype, device="cuda")
    expected = F.rms_norm(x.double(), (4096,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=ERRORS[dtype], rtol=ERRORS[dtype])
    gate_up = torch.randn(30, 2 * 14336, dtype=dtype, device="cuda")
    gate, up = gate_up.double().chunk(2, -1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, atol=ERRORS[dtype], rtol=ERRORS[dtype])


@pytest.mark.parametrize("num_rows", [2, 256, 3000])
def test_a_product_and_its_sum_are_those_of_two_kernels(num_rows: int) -> None:
    """Whether the product's kernel adds, or the norm behind it; to the bit where torch's product is added to."""
    layer = Linear(torch.randn(4096, 1024, device="cuda").bfloat16() * 0.02, format=FORMATS[WeightFormat.FP8])
    x, add = (torch.randn(num_rows, width, device="cuda").bfloat16() for width in (1024, 4096))
    weight, product = torch.randn(4096, device="cuda").bfloat16(), layer(x)
    terms = layer.terms(x, add.clone(), Shard())
    assert isinstance(terms, Unsummed) == (num_rows > scaled.most_rows(4096))
    if isinstance(terms, Unsummed):
        normed, total = rms_norm_of_sum(terms, weight, 1e-5, None), terms.add_NI
        assert torch.equal(total, product + add)
        assert torch.equal(normed, rms_norm(total, weight, 1e-5))
    else:
        torch.testing.assert_close(terms, product + add, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_rows", [1, 2, 17, 32, 100])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (1024, 3072), (960, 576)])
def test_products(shape: tuple[int, int], num_rows: int) -> None:
    """Whatever kernel takes them: with something to add, and in float32; twice, as what is counted in must be empty."""
    outputs, inputs = shape
    x = torch.randn(num_rows, inputs, device="cuda").bfloat16()
    weight = (torch.randn(outputs, inputs, device="cuda") * 0.02).bfloat16()
    add, counters = torch.randn(num_rows, outputs, device="cuda").bfloat16(), counters_for(weight)
    expected = x.double() @ weight.double().T
    for _ in range(2):
        got = linear(x, weight, *counters, add=add.clone())
        torch.testing.assert_close(got.double(), expected + add.double(), atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(products(x, weight).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_decodes", [1, 7, 20, 37, 70])
@pytest.mark.parametrize("format", KVFormat)
def test_attention(
    shape: tuple[int, int, int, int, int | None], dtype: torch.dtype, num_decodes: int, format: KVFormat
) -> None:
    """Of a batch of decodes, as large as each of the ways to cut it, and of chunks of prompts beside them."""
    heads, kv_heads, head_dim, block_size, window = shape
    if dtype is torch.bfloat16 and head_dim < 16:
        pytest.skip("such a model is a toy, in float32")
    if format.is_quantized:
        block_size = 64
    draw = torch.Generator().manual_seed(num_decodes)
    counts = [1] * num_decodes + torch.randint(2, 300, (5,), generator=draw).tolist()
    lengths = [int(torch.randint(count, 1300, (), generator=draw)) for count in counts]
    kept, formats = KVShape(2, kv_heads, head_dim, dtype), (KVFormat.AUTO, format)
    cache = KVCache(kept, num_blocks=400, block_size=block_size, device="cuda", formats=formats)
    fill(cache)
    tables = torch.randint(0, 400, (len(counts), -(-1300 // block_size)), generator=draw, dtype=torch.int32).cuda()
    batch = batch_of(tables, counts, lengths, num_decodes=num_decodes)
    q = torch.randn(sum(counts), heads, head_dim, dtype=dtype, device="cuda")
    shared = plan(batch, cache)
    for _ in range(2):
        got = paged_attention(q, cache, 1, shared, scale=head_dim**-0.5, window=window)
    expected = definition(q, cache, tables, counts, lengths, window=window)
    torch.testing.assert_close(got.double(), expected, atol=ERRORS[dtype], rtol=ERRORS[dtype])


EIGHT_BITS = [KVFormat.FP8_E4M3, KVFormat.INT8]
WIDENED = [
    ([300, 700, 24], [300, 700, 1200], [0, 5, -1, 16]),
    ([1024, 0, 0], [1300, 70, 0], [-1, -1, -1, 0]),
    ([200, 256, 512], [900, 600, 520], [-1, 0, -1, 10]),
    ([0, 0, 256], [70, 900, 256], [-1, -1, 0, 4]),
]
"""Tokens of three chunks, the keys they see, and their first pages among 16 that are widened: all but few tokens, none for want of room, one, and
the last."""


@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64)])
def test_captured_chunks_see_pages_widened_or_not_as_they_come(
    shape: tuple[int, int, int], format: KVFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay widens the pages of the chunks that it then holds, as far as there is room; either way attention is what it should be."""
    from services.engine.ops.kernels import pages

    monkeypatch.setattr(pages, "REACH", 1)
    heads, kv_heads, head_dim = shape
    formats = (KVFormat.AUTO, format)
    cache = KVCache(
        KVShape(2, kv_heads, head_dim, torch.bfloat16), num_blocks=80, block_size=64, device="cuda", formats=formats
    )
    fill(cache)
    tables = torch.randperm(80, dtype=torch.int32, device="cuda")[:63].view(3, 21)
    q = torch.randn(1024, heads, head_dim, device="cuda").bfloat16()
    works, step = captured_works(WIDENED[0][0], WIDENED[0][1], tables=tables, most=1024)

    def attend() -> tuple[AttentionPlan, Tensor]:
        shared = plan(step, cache)
        return shared, paged_attention(q, cache, 1, shared, scale=head_dim**-0.5)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shared, out = attend()
    for counts, lengths, first in WIDENED:
        update(works, counts, lengths)
        graph.replay()
        assert shared.kernels._pages is not None and shared.kernels._pages.first_P1.tolist() == first
        expected = definition(q[: sum(counts)], cache, tables, counts, lengths, window=None)
        error = ERRORS[torch.bfloat16]
        torch.testing.assert_close(out[: sum(counts)].double(), expected, atol=error, rtol=error)


def captured_works(counts: list[int], lengths: list[int], *, tables: Tensor, most: int) -> tuple[Works, Batch]:
    """Chunks of which the host knows only how many and how long they may be, and the step of them."""
    nobody = torch.zeros(0, dtype=torch.int32, device="cuda")
    rows, zeros = (torch.arange(len(counts), device="cuda"), torch.zeros(len(counts) + 1, device="cuda").int())
    works = Works(nobody, nobody, rows, zeros[1:].clone(), zeros[1:].clone(), zeros.clone(), most_prefill=most)
    update(works, counts, lengths)
    return works, replace(batch_of(tables, counts, lengths, num_decodes=0), works=works)


def update(works: Works, counts: list[int], lengths: list[int]) -> None:
    """Makes others of them, in place."""
    works.prefill_counts_P.copy_(torch.tensor(counts))
    works.prefill_lengths_P.copy_(torch.tensor(lengths))
    works.query_starts[1:] = works.prefill_counts_P.cumsum(0)


@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("shape", [(8, 128), (3, 64)])
def test_pages_are_widened_to_what_they_stand_for(shape: tuple[int, int], format: KVFormat) -> None:
    """To the last bit, where there are more pages than programs too."""
    from services.engine.ops.kernels import pages

    formats = (KVFormat.AUTO, format)
    cache = KVCache(KVShape(2, *shape, torch.bfloat16), num_blocks=1000, block_size=64, device="cuda", formats=formats)
    fill(cache)
    tables = torch.randperm(1000, dtype=torch.int32, device="cuda")[None]
    length = torch.tensor([64000], dtype=torch.int32, device="cuda")
    found = pages.plan(
        tables, torch.zeros_like(length), length, length, most_tokens=64000, cache=cache, dtype=torch.bfloat16
    )
    assert found is not None and found.first_P1.tolist() == [0, 1000]
    pages.widen(cache, 1, found)
    for got, wanted in zip(found.wide[:1000].unbind(1), cache.layers[1].read(tables[0].long()), strict=True):
        assert torch.equal(got.view(wanted.shape), wanted)


@pytest.mark.parametrize("format", EIGHT_BITS)
@pytest.mark.parametrize("dtype", ERRORS)
def test_keys_and_values_become_8_bits(dtype: torch.dtype, format: KVFormat) -> None:
    """As the specification makes them, but for the last place of a division; what is no number is NaN."""
    from services.engine.ops.kernels import qkv
    from services.engine.ops.rotary import Angles

    shape = KVShape(2, 8, 128, dtype)
    mine, expected = (
        KVCache(shape, num_blocks=10, block_size=64, device="cuda", formats=(KVFormat.AUTO, format)) for _ in range(2)
    )
    projected = (
        torch.randn(500, 32 + 16, 128, device="cuda") * torch.logspace(-6, 6, 500, device="cuda")[:, None, None]
    ).to(dtype)
    projected[3, 35, 7], projected[4] = torch.nan, 0
    still = Angles(torch.ones(500, 1, 128, device="cuda"), torch.zeros(500, 1, 128, device="cuda"))
    slots = torch.randperm(640, device="cuda")[:500]
    qkv.prepare(projected, still, mine, 1, slots, heads=32, norm_weights=None, eps=1e-5)
    expected.write(1, projected[:, 32:].view(500, 2, 8, 128), expected.locate(slots))
    check_alike(mine.layers[1], expected.layers[1])


def check_alike(got: KVLayer, wanted: KVLayer) -> None:
    """What lies in a cache of 8 bits is as specified, but for how a GPU divides.

    It divides float32 to 2 units of the last place, 2^-22 of the quotient at most. So a scale is off by that much, and a
    number divided by it by less than 2^-20, where it is 127 steps of int8 or 16 of fp8 at most: less than 2^-13 of a step.
    Only what lies so near the middle between two 8-bit numbers may become the other one: almost nothing of float32, but in
    bfloat16, where a number and the largest have 8 places each, some are in the very middle.

    The 8-bit numbers themselves are compared. Read in bfloat16 two neighbours may be 2 of its places apart where a step is
    hardly more than one.
    """
    assert got.scales is not None and wanted.scales is not None
    torch.testing.assert_close(got.scales, wanted.scales, rtol=2**-21, atol=0, equal_nan=True)
    apart = (_numbered(got.kv) - _numbered(wanted.kv)).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.01


def _numbered(x: Tensor) -> Tensor:
    """The place of each 8-bit number among all of its type: neighbours are 1 apart."""
    if x.dtype is torch.int8:
        return x.int()
    bits = x.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50, "seed": 9},
    {"temperature": 1.0, "top_p": 0.9, "seed": 1 << 40},
    {"temperature": 1.3, "top_k": 2000, "top_p": 0.8, "min_p": 0.001},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 0.8, "min_p": 0.05, "logprobs": 20},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 3},
    {"temperature": 1.0, "repetition_penalty": 0.8, "top_k": 10},
    {"logit_bias": tuple((token, 0.01 * token) for token in range(1024)), "logprobs": 0},
    {
        "stop": StopRules(100, min_tokens=101, stop_token_ids=frozenset(range(0, 128000, 125))),
        "logit_bias": ((250, 60.0),),
    },
]


def asking(num_rows: int, vocab: int) -> list[Sequence]:
    """Of all kinds, with 99 tokens of an answer behind 300 of a prompt."""
    draw = random.Random(0)
    return [
        sequence(
            [draw.randrange(vocab) for _ in range(300)],
            [draw.randrange(50) for _ in range(99)],
            **{"seed": row, **wish},
        )
        for row, wish in zip(range(num_rows), cycle(WISHES), strict=False)
    ]


def test_whatever_rows_ask_for_is_what_the_specification_gives_them() -> None:
    """On a real vocabulary, 220 rows of all kinds: tokens, where they are written, and log-probabilities."""
    from services.engine.kernel_sampler import KernelSampler

    num_rows, vocab = 220, 128256
    state, selection = admitted(*asking(num_rows, vocab), device="cuda")
    logits = 3 * torch.randn(num_rows, vocab, device="cuda")
    expected = TorchSampler(state)(logits.clone(), selection)
    found = KernelSampler(state)(logits.clone(), selection)
    # Sums are rounded in another order: a near tie may go the other way.
    assert (found.token_ids_R == expected.token_ids_R).sum() >= num_rows - 2
    torch.testing.assert_close(found.peaks_R, expected.peaks_R)
    assert torch.equal(state.tokens[selection.slots_R, selection.positions_R].long(), found.token_ids_R)
    assert found.reported is not None and expected.reported is not None
    assert found.reported.counts == expected.reported.counts
    for row, count in enumerate(expected.reported.counts):
        if count is not None and found.token_ids_R[row] == expected.token_ids_R[row]:
            for name in ("chosen_R", "top_RC"):
                mine, theirs = getattr(found.reported, name)[row], getattr(expected.reported, name)[row]
                some = slice(count) if mine.ndim else ...
                torch.testing.assert_close(mine[some], theirs[some], atol=1e-4, rtol=1e-5)


def test_a_row_is_sampled_alike_in_any_company() -> None:
    """The same token and log-probabilities to the last bit: alone, among others, and again; flat rows, of which no list holds all, too."""
    from services.engine.kernel_sampler import KernelSampler

    num_rows, vocab = 33, 128256
    state, selection = admitted(*asking(num_rows, vocab), device="cuda")
    sampler = KernelSampler(state)
    logits = torch.randn(num_rows, vocab, device="cuda") * torch.linspace(0.01, 4, num_rows, device="cuda")[:, None]
    together, again = (sampler(logits.clone(), selection) for _ in range(2))
    assert torch.equal(again.token_ids_R, together.token_ids_R)
    for row in range(num_rows):
        alone = sampler(logits[row : row + 1].clone(), selection.take([row], torch.tensor([row], device="cuda")))
        assert alone.token_ids_R[0] == together.token_ids_R[row]
        if alone.reported is not None and together.reported is not None:
            count = alone.reported.counts[0]
            assert alone.reported.chosen_R[0] == together.reported.chosen_R[row]
            assert torch.equal(alone.reported.top_RC[0, :count], together.reported.top_RC[row, :count])


@dataclass(frozen=True, slots=True)
class Mixture:
    """A layer's experts and router."""

    router_EI: Tensor
    gate_up_EOI: Tensor
    down_EIF: Tensor
    top_k: int

    @classmethod
    def drawn(cls, num_experts: int, top_k: int, hidden: int, size: int, *, dtype: torch.dtype) -> Mixture:
        shapes = (num_experts, hidden), (num_experts, 2 * size, hidden), (num_experts, hidden, size)
        drawn = (torch.randn(shape, device="cuda", dtype=dtype) * shape[-1] ** -0.5 for shape in shapes)
        return cls(*drawn, top_k)

    def logits(self, x_NI: Tensor) -> Tensor:
        """In float32: a rounding must not decide between two experts."""
        return x_NI.float() @ self.router_EI.float().T

    def mixed(self, x_NI: Tensor, *, first: int = 0, last: int | None = None, add: Tensor | None = None) -> Tensor:
        """As the layer computes it, by the experts from `first` to before `last`."""
        stacks = self.gate_up_EOI[first:last], self.down_EIF[first:last]
        experts = Experts.of(*stacks, first=first, total=len(self.gate_up_EOI))
        return moe.mixture(x_NI, self.logits(x_NI), experts, top_k=self.top_k, normalize=True, add=add)

    def defined(self, x_NI: Tensor) -> Tensor:
        """In float64, an expert after the other."""
        weights_NA, experts_NA = moe.route(self.logits(x_NI), top_k=self.top_k, normalize=True)
        out = torch.zeros(x_NI.shape, dtype=torch.float64, device="cuda")
        for expert in range(len(self.gate_up_EOI)):
            rows, choices = (experts_NA == expert).nonzero(as_tuple=True)
            gate, up = (x_NI[rows].double() @ self.gate_up_EOI[expert].double().T).chunk(2, -1)
            answers = (F.silu(gate) * up) @ self.down_EIF[expert].double().T
            out.index_add_(0, rows, answers * weights_NA[rows, choices, None].double())
        return out


MIXTURES = [(128, 8, 2048, 768), (8, 2, 4096, 1536), (5, 3, 72, 40)]
"""Experts, those of a token, hidden size, size of an expert; the last in ragged tiles."""


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 7, 32, 200, 256, 700, 3000])
@pytest.mark.parametrize("shape", MIXTURES)
@pytest.mark.parametrize("dtype", ERRORS)
def test_mixtures(dtype: torch.dtype, shape: tuple[int, int, int, int], num_tokens: int) -> None:
    """Whatever kernels take them, as a whole and as the sum of two parts; the same to the last bit every time."""
    mixture, x = Mixture.drawn(*shape, dtype=dtype), torch.randn(num_tokens, shape[2], dtype=dtype, device="cuda")
    add = torch.randn_like(x)
    expected, error = mixture.defined(x) + add.double(), 2 * ERRORS[dtype]
    got = mixture.mixed(x, add=add.clone())
    torch.testing.assert_close(got.double(), expected, atol=error, rtol=error)
    assert torch.equal(mixture.mixed(x, add=add.clone()), got)
    cut = shape[0] // 2 + 1
    got = mixture.mixed(x, first=cut, add=mixture.mixed(x, last=cut, add=add.clone()))
    torch.testing.assert_close(got.double(), expected, atol=error, rtol=error)


def test_routes_are_those_of_the_specification() -> None:
    """On a real router's width."""
    from services.engine.ops.kernels.route import route

    logits = torch.randn(3000, 128, device="cuda")
    weights, experts = route(logits, top_k=8, normalize=True)
    expected, where = moe.route(logits, top_k=8, normalize=True)
    assert torch.equal(experts.long(), where)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("num_tokens", [1, 32, 256])
def test_a_captured_mixture_takes_whatever_tokens_come(num_tokens: int) -> None:
    """A replay routes by what its input holds then: also where all tokens are alike and go to the same experts."""
    mixture = Mixture.drawn(*MIXTURES[0], dtype=torch.bfloat16)
    x = torch.randn(num_tokens, MIXTURES[0][2], dtype=torch.bfloat16, device="cuda")
    mixture.mixed(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixture.mixed(x)
    for content in (torch.randn_like(x), torch.randn_like(x), torch.randn_like(x[:1]).expand_as(x)):
        x.copy_(content)
        graph.replay()
        torch.testing.assert_close(out, mixture.mixed(x), atol=1e-2, rtol=1e-2)


def batch_of(tables: Tensor, counts: list[int], lengths: list[int], *, num_decodes: int) -> Batch:
    """The part of a batch that attention reads."""
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    nobody = torch.zeros(sum(counts), dtype=torch.int64, device="cuda")
    return Batch(
        token_ids_N=nobody,
        positions_N=nobody,
        write_slots_N=nobody,
        block_tables=tables,
        table_rows_S=torch.arange(len(counts), device="cuda"),
        query_starts=starts,
        kv_lengths_S=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        sample_rows_R=None,
        num_decodes=num_decodes,
        query_lens=counts,
        kv_lens=lengths,
        selection=Selection([], [], nobody, nobody),
    )


def definition(
    q_NHD: Tensor, cache: KVCache, tables: Tensor, counts: list[int], lengths: list[int], *, window: int | None
) -> Tensor:
    """Attention by its formula, a sequence at a time, in float64."""
    out, start = [], 0
    group = q_NHD.shape[1] // cache.shape.kv_heads
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        keys, values = (
            x.double().transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
            for x in cache.layers[1].read(tables[row].long())
        )
        behind = torch.arange(length - count, length, device="cuda")[:, None] - torch.arange(length, device="cuda")
        seen = (behind >= 0) & (behind < (window or 1 << 30))
        scores = q_NHD[start : start + count].transpose(0, 1).double() @ keys.mT * q_NHD.shape[2] ** -0.5
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        start += count
    return torch.cat(out)
