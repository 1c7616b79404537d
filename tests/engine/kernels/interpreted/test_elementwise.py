"""Norm, gate, angles, the way into the cache, one row times a matrix, the layout of a step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from services.engine.kv_cache import KVCache, KVShape
from services.engine.kv_format import KVFormat
from services.engine.ops import qkv as specified
from services.engine.ops import quantize
from services.engine.ops.activation import silu_mul
from services.engine.ops.attention import plan
from services.engine.ops.forms import RowScaled, Unnormed
from services.engine.ops.kernels import activation, gemv, norm, qkv, rotary, skinny, step
from services.engine.ops.kv_quant import PEAKS
from services.engine.ops.norm import rms_norm
from services.engine.ops.rotary import Angles, angles
from tests.engine.batches import Chunk, batch_of


@pytest.mark.parametrize("shape", [(5, 576), (3, 2, 64), (1, 33)])
def test_the_norm_is_the_norm(shape: tuple[int, ...]) -> None:
    """Of rows of any width."""
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))


def test_a_norm_adds_up_what_was_left_to_it() -> None:
    """Rounded as if another had added it, and left where it was asked for."""
    x, add, weight = (torch.randn(*shape).half() for shape in ((5, 576), (5, 576), (576,)))
    total = x + add
    form = RowScaled(torch.float8_e4m3fn)
    plain, rounded = add.clone(), add.clone()
    assert torch.equal(norm.rms_norm(x, weight, 1e-5, add=plain), norm.rms_norm(total, weight, 1e-5))
    got = norm.rms_norm_quantized(x, weight, 1e-5, form, add_NI=rounded)
    expected = norm.rms_norm_quantized(total, weight, 1e-5, form)
    assert torch.equal(got.scales_N, expected.scales_N)
    assert torch.equal(got.values_NI.view(torch.uint8), expected.values_NI.view(torch.uint8))
    assert torch.equal(plain, total) and torch.equal(rounded, total)


def test_the_gate_is_the_gate() -> None:
    """Of rows wider than one program."""
    gate_up = torch.randn(3, 2 * 1500)
    torch.testing.assert_close(activation.silu_mul(gate_up), silu_mul(gate_up))


def test_angles_are_the_angles() -> None:
    """Of a head whose half is no power of two, far into a context."""
    positions, frequencies = torch.tensor([0, 1, 5000]), torch.rand(12)
    for mine, expected in zip(
        rotary.angles(positions, frequencies, 1.5), angles(positions, frequencies, 1.5), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)


EVERY_SHAPE = [(9, 3, 64), (4, 4, 8), (4, 1, 24)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "with_norms", "format"),
    [
        *((*shape, with_norms, KVFormat.AUTO) for shape in EVERY_SHAPE for with_norms in (True, False)),
        (9, 3, 64, True, KVFormat.INT8),
        (4, 1, 24, False, KVFormat.FP8_E4M3),
    ],
)
def test_queries_keys_and_values_come_to_their_places(
    heads: int, kv_heads: int, head_dim: int, with_norms: bool, format: KVFormat
) -> None:
    """Queries are returned; keys and values lie where the specification puts them, and nothing else is touched."""
    batch = batch_of(Chunk([0], 37, [4, 1, 0]), Chunk([0] * 20, 3, [5, 2]), block_size=16)
    angles_ = angles(batch.positions_N, torch.rand(head_dim // 2), 1.0)
    projected = torch.randn(21, heads + 2 * kv_heads, head_dim)
    weights = (torch.randn(head_dim), torch.randn(head_dim)) if with_norms else None
    shape, formats = KVShape(2, kv_heads, head_dim, torch.float32), (KVFormat.AUTO, format)
    caches = [KVCache(shape, num_blocks=6, block_size=16, formats=formats) for _ in range(2)]
    plans = [plan(batch, cache) for cache in caches]
    mine = qkv.prepare(
        projected.clone(), angles_, caches[0], 1, plans[0].write_slots_N, heads=heads, norm_weights=weights, eps=1e-6
    )
    expected = specified.prepare(
        projected.clone(), angles_, caches[1], 1, plans[1], heads=heads, norm_weights=weights, eps=1e-6
    )
    torch.testing.assert_close(mine, expected)
    for layer in range(2):
        for kept, specified_ in zip(*(cache.layers[layer].read(torch.arange(7)) for cache in caches), strict=True):
            torch.testing.assert_close(kept, specified_)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("many", [1, 1024], ids=["values-apart", "together"])
@pytest.mark.parametrize("format", [KVFormat.FP8_E4M3, KVFormat.INT8])
def test_keys_and_values_become_the_8_bits_of_the_specification(
    format: KVFormat, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: of tokens of any size, zeros, halves that round to even, and what is no number."""
    monkeypatch.setattr(qkv, "_MANY", many)
    batch = batch_of(Chunk([0] * 40, 3, [5, 2, 0]), block_size=16)
    still = Angles(torch.ones(40, 1, 16), torch.zeros(40, 1, 16))
    projected = torch.randn(40, 2 + 2 * 2, 16) * torch.logspace(-38, 30, 40)[:, None, None]
    projected[20] = torch.arange(6 * 16).view(6, 16) - 48.5
    projected[20, :, 0] = PEAKS[format]
    projected[21], projected[22, 3, 9], projected[23, 4, 2] = 0, torch.nan, -torch.inf
    caches = [
        KVCache(KVShape(1, 2, 16, torch.float32), num_blocks=6, block_size=16, formats=[format]) for _ in range(2)
    ]
    plans = [plan(batch, cache) for cache in caches]
    same = {"heads": 2, "norm_weights": None, "eps": 1e-6}
    qkv.prepare(projected.clone(), still, caches[0], 0, plans[0].write_slots_N, **same)
    specified.prepare(projected.clone(), still, caches[1], 0, plans[1], **same)
    assert torch.equal(caches[0].data, caches[1].data)


def test_one_row_times_a_matrix() -> None:
    """With a bias and something to add, in the dtype asked for."""
    x, weight = torch.randn(1, 2048).bfloat16(), torch.randn(8, 2048).bfloat16()
    bias, add = torch.randn(8).bfloat16(), torch.randn(1, 8).bfloat16()
    assert gemv.is_supported(weight) and not gemv.is_supported(weight[:, :576])
    expected = x.double() @ weight.double().T
    got = gemv.gemv(x, weight, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)  # 2,048 products, in another order
    torch.testing.assert_close(gemv.gemv(x, weight, bias_O=bias, add=add), (expected + bias + add).bfloat16())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 1536), (16, 8192), (8, 8192)])
def test_one_row_times_a_matrix_in_8_bits(kind: torch.dtype, outputs: int, inputs: int) -> None:
    """The row as it is, normed and gated on the way or not; the matrix by a scale for each of its rows, whatever tile serves."""
    shapes = ((1, inputs), (inputs,), (outputs,), (1, outputs))
    x, norm_weight, bias, add = (torch.randn(*shape).half() for shape in shapes)
    matrix = quantize.by_torch(torch.randn(outputs, inputs) * 0.05, RowScaled(kind))
    plain = matrix.values_NI.double() * matrix.scales_N[:, None]
    same = {"scales": matrix.scales_N, "bias_O": bias, "dtype": torch.float32}
    got = gemv.gemv(x, matrix.values_NI, add=add, **same)
    torch.testing.assert_close(got.double(), x.double() @ plain.T + bias + add, atol=1e-4, rtol=1e-4)
    normed = F.rms_norm(x.double(), (inputs,), norm_weight.double(), 1e-5)
    gate, up = F.linear(normed, plain, bias.double()).chunk(2, -1)
    got = gemv.gemv(Unnormed(x, norm_weight, 1e-5), matrix.values_NI, gated=True, **same)
    torch.testing.assert_close(got.double(), F.silu(gate) * up, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 5, 32])
@pytest.mark.parametrize("outputs", [128, 64 * 40, 64 * 70])
def test_a_few_rows_times_a_matrix(outputs: int, num_rows: int) -> None:
    """By one program a tile, two or four, with a bias and something to add; the counters are ready for the next call."""
    x, weight = torch.randn(num_rows, 512).half(), torch.randn(outputs, 512).half()
    bias, add, counters = torch.randn(outputs).half(), torch.randn(num_rows, outputs).half(), skinny.counters_of(weight)
    split = skinny.split_of(weight)
    assert split == {128: 4, 64 * 40: 2, 64 * 70: 1}[outputs]
    expected = x.float() @ weight.float().T
    got = skinny.matmul(x, weight, split, counters=counters, dtype=torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
    got = skinny.matmul(x, weight, split, counters=counters, bias_O=bias, add=add)
    torch.testing.assert_close(got, (expected + bias + add).half(), atol=1e-2, rtol=1e-2)
    assert not counters.any()
    assert skinny.split_of(weight[:, :500]) is None and skinny.split_of(weight[:100]) is None


@pytest.mark.parametrize(
    ("outputs", "inputs", "with_bias"),
    [(8, 1024, True), (8, 1024, False), (2080, 2048, True), (8, 4096, True), (8, 4096, False)],
)
def test_one_row_is_normed_and_gated_while_it_is_multiplied(outputs: int, inputs: int, with_bias: bool) -> None:
    """In one pass and in several: what norm, product and gate give one after the other, but for what these round."""
    x, norm_weight = 3 * torch.randn(1, inputs).half(), torch.randn(inputs).half()
    weight = (torch.randn(outputs, inputs) * 0.05).half()
    bias = torch.randn(outputs).half() if with_bias else None
    row = Unnormed(x, norm_weight, 1e-5)
    normed = F.rms_norm(x.double(), (inputs,), norm_weight.double(), 1e-5)
    expected = F.linear(normed, weight.double(), None if bias is None else bias.double())
    got = gemv.gemv(row, weight, bias_O=bias, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
    gate, up = expected.chunk(2, -1)
    assert gemv.is_supported(weight)
    got = gemv.gemv(row, weight, bias_O=bias, dtype=torch.float32, gated=True)
    torch.testing.assert_close(got.double(), F.silu(gate) * up, atol=1e-4, rtol=1e-4)
    plain = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = gemv.gemv(x, weight, bias_O=bias, dtype=torch.float32, gated=True)
    gate, up = plain.chunk(2, -1)
    torch.testing.assert_close(got.double(), F.silu(gate) * up, atol=1e-3, rtol=1e-3)


def test_a_step_is_laid_out_from_slots_and_positions() -> None:
    """Each row's token, position, place in the cache and number of keys, for more rows than a program has; some of their tables
    grow before, by the block that the token goes to or by the next one."""
    tokens, tables = torch.randint(0, 99, (40, 64), dtype=torch.int32), torch.randint(0, 50, (40, 5), dtype=torch.int32)
    slots = torch.randperm(40).int()
    starts = torch.randint(0, 64, (40,), dtype=torch.int32)
    grown = torch.where(torch.arange(40) % 3 == 0, -1, starts // 16 + torch.arange(40) % 3 - 1).int()
    blocks = torch.arange(60, 100, dtype=torch.int32)
    expected = tables.clone()
    for slot, entry, block in zip(slots.tolist(), grown.tolist(), blocks.tolist(), strict=True):
        if entry >= 0:
            expected[slot, entry] = block
    ids, positions, writes, lengths = step.lay_out(slots, starts, grown, blocks, tokens, tables, block_size=16)
    assert torch.equal(tables, expected)
    at, where = slots.long(), starts.long()
    assert torch.equal(ids, tokens[at, where].long())
    assert torch.equal(positions, where)
    assert torch.equal(writes, tables[at, where // 16].long() * 16 + where % 16)
    assert torch.equal(lengths, starts + 1)


def test_works_are_laid_out_token_by_token() -> None:
    """Decodes, chunks, works that are not there and tokens that are nobody's, for more tokens than a program has."""
    counts = [1, 1, 1, 150, 3, 40, 0, 0]
    slots, starts = torch.tensor([4, 0, 7, 2, 5, 1, 8, 8]).int(), torch.tensor([9, 63, 0, 5, 0, 17, 0, 0]).int()
    ends = torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int()
    tokens, tables = torch.randint(0, 99, (9, 160), dtype=torch.int32), torch.randint(0, 50, (9, 10), dtype=torch.int32)
    found = step.lay_out_works(
        slots, starts, ends, torch.tensor([3]).int(), tokens, tables, num_tokens=256, block_size=16, spare_block=50
    )
    slots_N = slots.long().repeat_interleave(torch.tensor(counts))
    positions_N = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    nobody = torch.zeros(256 - len(slots_N), dtype=torch.int64)
    assert torch.equal(found.ids_N, torch.cat([tokens[slots_N, positions_N].long(), nobody]))
    assert torch.equal(found.positions_N, torch.cat([positions_N, nobody]))
    writes_N = tables[slots_N, positions_N // 16].long() * 16 + positions_N % 16
    assert torch.equal(found.write_slots_N, torch.cat([writes_N, nobody + 50 * 16]))
    assert found.lengths_S.tolist() == [10, 64, 1, 155, 3, 57, 0, 0]
    assert found.decode_lengths_S.tolist() == [10, 64, 1, 0, 0, 0, 0, 0]
    assert found.prefill_counts_S.tolist() == [0, 0, 0, 150, 3, 40, 0, 0]
