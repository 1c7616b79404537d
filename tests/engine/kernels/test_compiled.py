"""The kernels as an H100 or H200 would run them, compiled where there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from services.engine.kernel_sampler import KernelSampler
from services.engine.kv_cache import KVCache, KVShape
from services.engine.kv_format import KVFormat
from services.engine.ops.forms import Quantized, RowScaled, Unnormed
from services.engine.ops.kernels import (
    activation,
    bulk,
    bulk_hopper,
    decode_attention,
    gemv,
    gemv4,
    grouped,
    grouping,
    int4,
    invariant,
    moe,
    norm,
    pages,
    pairs,
    prefill_attention,
    qkv,
    quantize,
    rotary,
    route,
    scaled,
    skinny,
    step,
    widen,
)
from services.engine.ops.moe import Experts
from services.engine.ops.rotary import Angles
from services.engine.state import DeviceState, Selection
from tests.engine.kernels.offline import Compiled, described, offline

ROWS, SLOTS, CONTEXT = 32, 40, 4096
LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096, "intermediate": 14336, "vocab": 128256}
QWEN_600M = {"heads": 16, "kv_heads": 8, "head_dim": 128, "hidden": 1024, "intermediate": 3072, "vocab": 151936}
QWEN_30B = {"num_experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}
MIXTRAL = {"num_experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336}
SMOLLM = {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "intermediate": 1536, "vocab": 49152}


def launch_all(
    *, heads: int, kv_heads: int, head_dim: int, hidden: int, intermediate: int, vocab: int, dtype: torch.dtype
) -> None:
    """Every kernel once, as a model of this shape launches it."""
    cache = KVCache(KVShape(2, kv_heads, head_dim, dtype), num_blocks=4, block_size=64)
    tokens, tables = (
        torch.zeros(SLOTS, CONTEXT, dtype=torch.int32),
        torch.zeros(SLOTS, CONTEXT // 64, dtype=torch.int32),
    )
    rows, longs = torch.zeros(ROWS + 1, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int64)
    x, head_norm = torch.zeros(ROWS, hidden, dtype=dtype), torch.zeros(head_dim, dtype=dtype)
    step.lay_out(*[rows[:ROWS]] * 4, tokens, tables, block_size=64)
    step.lay_out_works(
        rows[:ROWS], rows[:ROWS], rows, rows[:1], tokens, tables, num_tokens=512, block_size=64, spare_block=9
    )
    norm.rms_norm(x, torch.zeros(hidden, dtype=dtype), 1e-5)
    angles = Angles(*rotary.angles(longs, torch.zeros(head_dim // 2), 1.0))
    projected = torch.zeros(ROWS, heads + 2 * kv_heads, head_dim, dtype=dtype)
    for weights in (None, (head_norm, head_norm)):
        qkv.prepare(projected, angles, cache, 1, longs, heads=heads, norm_weights=weights, eps=1e-5)
    launch_attention(cache, heads=heads, chunks=(64, 1024))
    activation.silu_mul(torch.zeros(ROWS, 2 * intermediate, dtype=dtype))
    state = DeviceState(num_slots=SLOTS, max_len=CONTEXT, block_size=64)
    logits, selection = torch.zeros(ROWS, vocab), Selection([], [], rows[:ROWS], rows[:ROWS])
    KernelSampler(state).plain(logits, selection)
    KernelSampler(state).whole(logits, torch.zeros_like(logits), selection)
    weight = torch.zeros(64, hidden, dtype=dtype)
    if gemv.is_supported(weight):
        gemv.gemv(x[:1], weight, add=x[:1, :64])
        gemv.gemv(Unnormed(x[:1], x[0], 1e-5), weight)
        gemv.gemv(Unnormed(x[:1], x[0], 1e-5), weight, gated=True)
    if (split := skinny.split_of(weight)) is not None:
        skinny.matmul(x, weight, split, counters=skinny.counters_of(weight))


def launch_attention(cache: KVCache, *, heads: int, chunks: tuple[int, ...]) -> None:
    """Of decodes, then of prompts; in 8 bits also of those whose pages are widened."""
    tables, rows = torch.zeros(SLOTS, CONTEXT // 64, dtype=torch.int32), torch.zeros(ROWS + 1, dtype=torch.int32)
    q = torch.zeros(ROWS, heads, cache.shape.head_dim, dtype=cache.shape.dtype)
    for chunk, most_items in zip(chunks, (99, 9999), strict=False):  # a program for each item, and many for a program
        work = decode_attention.plan(tables, rows[:ROWS], rows[:ROWS], chunk=chunk, most_items=most_items)
        scratch = decode_attention.scratch(work, heads=heads, cache=cache)
        decode_attention.attend(q, q, cache, 1, work, scratch, scale=0.1, window=None)
    works = (tables, rows[:ROWS], rows[:ROWS], rows, rows[:ROWS])
    group = heads // cache.shape.kv_heads
    tuning = prefill_attention.tuning(q.dtype, cache.layers[1].kv.itemsize)
    prompts = prefill_attention.plan(*works, most_tokens=2048, group=group, tuning=tuning)
    prefill_attention.attend(q, q, cache, 1, prompts, scale=0.1, window=None)
    if cache.layers[1].scales is not None:
        wide = pages.plan(tables, *[rows[:ROWS]] * 3, most_tokens=2048, cache=cache, dtype=q.dtype)
        assert wide is not None
        pages.widen(cache, 1, wide)
        prefill_attention.attend(q, q, cache, 1, prompts, scale=0.1, window=None, pages=wide)


@pytest.fixture(scope="module", params=[LLAMA_8B, QWEN_600M, SMOLLM], ids=["llama-8b", "qwen3-0.6b", "smollm2-135m"])
def compiled(request: pytest.FixtureRequest) -> list[Compiled]:
    """All kernels of a model in bfloat16."""
    with offline() as kernels:
        launch_all(**request.param, dtype=torch.bfloat16)
    return [described(kernel) for kernel in kernels]


@pytest.mark.timeout(300)
def test_no_kernel_spills_registers(compiled: list[Compiled]) -> None:
    """Nothing a loop needs goes through memory. Sines of large angles do, once a step."""
    assert len(compiled) >= 20
    assert [each for each in compiled if each.spilled_bytes and each.name != "_angles"] == []


@pytest.mark.timeout(300)
def test_prompts_and_few_rows_use_hopper_s_matrix_units(compiled: list[Compiled]) -> None:
    """They multiply by wgmma, out of no more shared memory than a multiprocessor has."""
    wide = {each.name: each for each in compiled if "wgmma" in each.ptx}
    assert set(wide) - {"_matmul_few_rows"} == {"_attend_prompts"}
    assert all(each.shared_bytes <= 227 << 10 for each in wide.values())


@pytest.mark.timeout(300)
def test_pages_are_read_in_wide_loads(compiled: list[Compiled]) -> None:
    """No kernel loads byte by byte what lies side by side."""
    assert [each.name for each in compiled if "ld.global.b8" in each.ptx] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", [LLAMA_8B, SMOLLM], ids=["llama-8b", "smollm2-135m"])
def test_deterministic_products_and_attention_use_the_matrix_units(model: dict[str, int]) -> None:
    """By wgmma, in wide loads, without a spill and within the shared memory that there is."""
    heads, kv_heads, head_dim, hidden = (model[name] for name in ("heads", "kv_heads", "head_dim", "hidden"))
    cache = KVCache(KVShape(2, kv_heads, head_dim, torch.bfloat16), num_blocks=4, block_size=64)
    x, weight = torch.zeros(ROWS, hidden, dtype=torch.bfloat16), torch.zeros(64, hidden, dtype=torch.bfloat16)
    rows, tables = torch.zeros(ROWS + 1, dtype=torch.int32), torch.zeros(SLOTS, CONTEXT // 64, dtype=torch.int32)
    q = torch.zeros(ROWS, heads, head_dim, dtype=torch.bfloat16)
    with offline() as kernels:
        invariant.matmul(x, weight, add=x[:, :64])
        invariant.matmul(x, weight, dtype=torch.float32)
        works = prefill_attention.plan(
            tables, rows[:ROWS], rows[:ROWS], rows, rows[:ROWS],
            most_tokens=2048, group=heads // kv_heads, tuning=prefill_attention.tuning(q.dtype, 2),
        )  # fmt: skip
        prefill_attention.attend(q, q, cache, 1, works, scale=0.1, window=None, alike=True)
    found = [each for each in map(described, kernels) if each.name in ("_matmul_invariant", "_attend_prompts")]
    assert len(found) == 3
    for each in found:
        assert "wgmma" in each.ptx and "ld.global.b8" not in each.ptx
        assert each.spilled_bytes == 0 and each.shared_bytes <= 227 << 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sequences", [1, 16, ROWS])
def test_decodes_with_wide_heads_find_room(sequences: int, dtype: torch.dtype) -> None:
    """Heads of 256 numbers fit into a multiprocessor, and into its registers."""
    cache = KVCache(KVShape(2, 8, 256, dtype), num_blocks=4, block_size=64)
    tables, rows = torch.zeros(SLOTS, CONTEXT // 64, dtype=torch.int32), torch.zeros(ROWS + 1, dtype=torch.int32)
    q = torch.zeros(sequences, 16, 256, dtype=dtype)
    with offline() as kernels:
        work = decode_attention.plan(tables, rows[:sequences], rows[:sequences], chunk=128, most_items=99)
        scratch = decode_attention.scratch(work, heads=16, cache=cache)
        decode_attention.attend(q, q, cache, 1, work, scratch, scale=0.1, window=None)
    (found,) = (each for each in map(described, kernels) if each.name == "_attend_decodes")
    assert found.shared_bytes <= 227 << 10 and found.spilled_bytes == 0


def launch_experts(num_tokens: int, *, num_experts: int, top_k: int, hidden: int, intermediate: int) -> None:
    """A mixture of experts in bfloat16, of tensors that have a shape and no content."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    stacks = (empty(num_experts, 2 * intermediate, hidden),), (empty(num_experts, hidden, intermediate),)
    experts = Experts(*stacks, first=0, count=num_experts, total=num_experts)
    x = empty(num_tokens, hidden)
    moe.mixture(x, empty(num_tokens, num_experts), experts, top_k=top_k, normalize=True, add=x)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_tokens", [1, 32, 256, 512, 8192])
@pytest.mark.parametrize("shape", [QWEN_30B, MIXTRAL], ids=["qwen3-30b-a3b", "mixtral-8x7b"])
def test_experts_are_launched_without_their_content(
    shape: dict[str, int], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of tokens, the host is asked nothing: it has shapes alone, so a step can be captured. What it
    launches waits for what is before it, spills nothing, reads matrices in pieces of 16 bytes, and multiplies by wgmma
    where rows are grouped."""
    for module in (grouped, grouping, pairs, route):
        monkeypatch.setattr(module, "overlapped", lambda _: {"OVERLAP": True, "launch_pdl": True})
    with offline() as kernels:
        launch_experts(num_tokens, **shape)
    compiled = [described(kernel) for kernel in kernels]
    products = [each for each in compiled if each.name in ("_experts_gated", "_experts_down", "_experts_product")]
    assert len(compiled) == (2 if num_tokens == 1 else 5) and len(products) == 2
    assert [each for each in compiled if each.spilled_bytes] == []
    assert [each.name for each in compiled if "ld.global.b8" in each.ptx] == []
    assert [each.name for each in compiled if each.ptx.count("griddepcontrol.wait") != 1] == []
    for each in products:
        assert "cp.async.cg.shared.global" in each.ptx
        assert ("wgmma" in each.ptx) == (num_tokens > 1)
        assert each.shared_bytes <= 227 << 10


@pytest.fixture(scope="module")
def quantized() -> list[Compiled]:
    """What a model in fp8 has more, for each number of rows: products with matrices wide and narrow, and what rounds rows."""
    form, half = RowScaled(torch.float8_e4m3fn), torch.bfloat16
    with offline() as kernels:
        for outputs, inputs in ((6144, 4096), (4096, 14336), (576, 576)):
            weight, scales = torch.zeros(outputs, inputs, dtype=form.dtype), torch.zeros(outputs)
            for num_rows in (1, 16, 32, 64, 128, 256):
                x = Quantized(torch.zeros(num_rows, inputs, dtype=form.dtype), torch.zeros(num_rows))
                add = torch.zeros(num_rows, outputs, dtype=half)
                scaled.matmul(x, weight, scales, skinny.counters_of(weight), add=add, dtype=half)
        for width in (576, 4096):
            norm.rms_norm_quantized(torch.zeros(ROWS, width, dtype=half), torch.zeros(width, dtype=half), 1e-5, form)
        for width in (1536, 14336, 28672):
            quantize.quantize(torch.zeros(ROWS, width, dtype=half), form)
            activation.silu_mul_quantized(torch.zeros(ROWS, 2 * width, dtype=half), form)
    return [described(kernel) for kernel in kernels]


@pytest.mark.timeout(300)
def test_eight_bits_go_to_the_matrix_units_as_they_are(quantized: list[Compiled]) -> None:
    """Native e4m3, loaded sixteen bytes at a time, without a spill and within the shared memory that there is."""
    products = [each for each in quantized if each.name == "_matmul_few_rows"]
    assert len(products) == 18
    for each in products:
        assert re.search(r"wgmma\.mma_async\S+\.m64n(\d+)k32\.f32\.e4m3\.e4m3", each.ptx)
        assert "cp.async.cg.shared.global [ " in each.ptx and ", 0x10, " in each.ptx
        assert each.shared_bytes <= 227 << 10
    assert [each for each in quantized if each.spilled_bytes] == []


@pytest.mark.timeout(300)
def test_rows_are_rounded_by_the_conversion_instruction(quantized: list[Compiled]) -> None:
    """Two values at a time, read and written in wide accesses, and NaN among them is seen."""
    rounded = [each for each in quantized if each.name not in ("_matmul_few_rows", "_silu_mul")]
    assert {each.name for each in rounded} == {"_rms_norm", "_quantize", "_silu_mul_quantized"}
    for each in rounded:
        assert "cvt.rn.satfinite.e4m3x2.f32" in each.ptx and "max.NaN.f32" in each.ptx
        assert "ld.global.v4.b32" in each.ptx and "st.global.b8" not in each.ptx


INT8, PARTS = RowScaled(torch.int8), RowScaled(torch.int8, parts=2)


@pytest.mark.timeout(300)
def test_whole_numbers_go_to_the_matrix_units_as_they_are() -> None:
    """Of a few rows and of rows in two parts: int8 by wgmma, loaded sixteen bytes at a time, without a spill and within the
    shared memory that there is."""
    cases = [(6144, 4096, rows, INT8) for rows in (16, 128, 256)] + [(576, 576, 32, INT8)]
    cases += [(6144, 4096, rows, PARTS) for rows in (8, 64, 256, 1024)]
    with offline() as kernels:
        for outputs, inputs, num_rows, form in cases:
            x = quantize.empty(num_rows, inputs, form, device=torch.device("cpu"))
            weight = torch.zeros(outputs, inputs, dtype=torch.int8)
            add = torch.zeros(num_rows, outputs, dtype=torch.bfloat16)
            scaled.matmul(x, weight, torch.zeros(outputs), skinny.counters_of(weight), add=add, dtype=torch.bfloat16)
    for kernel in kernels:
        each = described(kernel)
        assert re.search(r"wgmma\.mma_async\S+\.m64n(\d+)k32\.s32\.s8\.s8", each.ptx)
        assert "cp.async.cg.shared.global [ " in each.ptx and ", 0x10, " in each.ptx
        assert each.shared_bytes <= 227 << 10 and not each.spilled_bytes


def launch_many(module: ModuleType, cut: bulk.Tiling | bulk_hopper.Tiling, dtype: torch.dtype) -> list[Compiled]:
    """In int8 and in fp8, each with something to add and without."""
    num_rows, outputs, inputs = 1000, 4104, 4096
    added = torch.empty(num_rows, outputs, dtype=torch.bfloat16, device="meta")
    of_rows, of_outputs = torch.empty(num_rows, device="meta"), torch.empty(outputs, device="meta")
    with offline() as kernels:
        for eight in (torch.int8, torch.float8_e4m3fn):
            x, weight = (torch.empty(each, inputs, dtype=eight, device="meta") for each in (num_rows, outputs))
            for add in (added, None):
                module.matmul(x, weight, of_rows, of_outputs, bias_O=of_outputs, add=add, dtype=dtype, cut=cut)
    found = [described(kernel) for kernel in kernels]
    for each, kind in zip(found, ("s32.s8.s8",) * 2 + ("f32.e4m3.e4m3",) * 2, strict=True):
        assert re.search(rf"wgmma\.mma_async\S+k32\.{kind}", each.ptx)
        assert "cp.async.bulk.tensor.2d.shared" in each.ptx and "cp.async.bulk.tensor.2d.global" in each.ptx
        assert "cp.async.cg" not in each.ptx and not each.spilled_bytes
    return found


every_width = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


@pytest.mark.parametrize(
    ("tilings", "num_rows", "index"),
    [
        (bulk.TILINGS, 8192, 0),
        (bulk.TILINGS, 1024, 1),
        (bulk_hopper.TILINGS, 8192, 0),
        (bulk_hopper.TILINGS, 1024, 1),
        (bulk_hopper.TILINGS, 128, 2),
    ],
)
def test_each_multiprocessor_has_a_tile(tilings: Sequence[bulk.Cut], num_rows: int, index: int) -> None:
    """Of the largest that are enough for all 132; where none is, of the last."""
    assert bulk.fitting(tilings, num_rows, 4096, 132) is tilings[index]


@pytest.mark.timeout(300)
@every_width
@pytest.mark.parametrize("cut", bulk.TILINGS, ids=["large", "small"])
def test_many_rows_are_copied_by_descriptors(cut: bulk.Tiling, dtype: torch.dtype) -> None:
    """And so are the results; without a spill and within the registers and the shared memory that there are, for two programs of small
    tiles."""
    together = 1 if cut.persistent else 2
    for each in launch_many(bulk, cut, dtype):
        assert together * (each.shared_bytes + 1024) <= 228 << 10
        assert together * each.registers * 32 * cut.warps <= 65536


@pytest.mark.timeout(300)
@every_width
@pytest.mark.parametrize("cut", bulk_hopper.TILINGS, ids=["large", "by turns", "small"])
def test_warps_have_roles(cut: bulk_hopper.Tiling, dtype: torch.dtype) -> None:
    """Three of them, with registers of their own; a product stays under way while the next is begun, and warps wait for those
    of their group alone."""
    for each in launch_many(bulk_hopper, cut, dtype):
        assert each.shared_bytes <= 227 << 10 and each.registers * 12 * 32 <= 65536
        assert {("inc", "240"), ("dec", "24")} <= set(re.findall(r"setmaxnreg\.(\w+)\S+\s+(\d+)", each.ptx))
        loops = re.findall(r"wgmma\.fence.*?wgmma\.wait_group\.sync\.aligned 0", each.ptx, re.DOTALL)
        assert len(loops) == 2
        for loop in loops:
            assert "wgmma.wait_group.sync.aligned 1" in loop
            assert {threads for _, threads in re.findall(r"bar\S*\.sync\s+(\d+), (\d+)", loop)} == {"128"}


@pytest.mark.timeout(300)
def test_rows_become_whole_numbers_without_a_conversion() -> None:
    """Which would take four times as long; two parts of them too, in wide accesses."""
    half = torch.bfloat16
    with offline() as kernels:
        for form in (INT8, RowScaled(torch.int8, by=torch.ones(1)), RowScaled(torch.int8, parts=2)):
            norm.rms_norm_quantized(torch.zeros(ROWS, 4096, dtype=half), torch.zeros(4096, dtype=half), 1e-5, form)
            quantize.quantize(torch.zeros(ROWS, 28672, dtype=half), form)
            activation.silu_mul_quantized(torch.zeros(ROWS, 2 * 14336, dtype=half), form)
    for kernel in kernels:
        each = described(kernel)
        assert not re.search(r"cvt\.rz?n?i\.\w+\.f32", each.ptx) and not each.spilled_bytes
        assert "max.NaN.f32" in each.ptx
        assert "ld.global.v4.b32" in each.ptx and "st.global.b8" not in each.ptx


def four_bits(outputs: int, inputs: int, group: int, *, symmetric: bool) -> int4.Packed:
    """A matrix of zeros."""
    scales = torch.zeros(outputs, inputs // group)
    values = torch.zeros(outputs, inputs, dtype=torch.int8)
    return int4.packed(values, scales, None if symmetric else scales, dtype=torch.bfloat16)


FOUR_BITS = ((128, True, 1), (128, True, 32), (128, True, 64), (32, False, 128), (64, True, 16), (32, False, 256))
"""The inputs of a group, whether they are symmetric, and rows."""


@pytest.mark.timeout(300)
def test_four_bits_are_widened_in_the_registers_of_the_matrix_units() -> None:
    """Two at a time, of words and scales that were copied ahead, and never by way of shared memory; without a spill. Scales are the low halves of
    pairs, or every other time the high ones, where those are no offsets."""
    with offline() as kernels:
        for group, symmetric, num_rows in FOUR_BITS:
            x = torch.zeros(num_rows, 4096, dtype=torch.bfloat16)
            int4.matmul(x, four_bits(6144, 4096, group, symmetric=symmetric), dtype=torch.bfloat16)
    for (group, symmetric, _), kernel in zip(FOUR_BITS, kernels, strict=True):
        each = described(kernel)
        low, high = (len(re.findall(rf"prmt\.b32 s, \S+ \S+ {half};", each.ptx)) for half in ("0x5410", "0x7632"))
        assert low and high == (low if symmetric and group < 128 else 0)
        assert re.search(r"wgmma\.mma_async\S+\.m64n(\d+)k16\.f32\.bf16\.bf16", each.ptx)
        loop = each.ptx[each.ptx.index("wgmma.fence") : each.ptx.rindex("wgmma.mma_async")]
        assert "st.shared" not in loop and "ld.global" not in loop and "cvt.rn.bf16" not in loop
        assert "lop3.b32" in each.ptx
        assert each.shared_bytes <= 227 << 10 and not each.spilled_bytes


@pytest.mark.timeout(300)
def test_one_row_meets_whole_numbers_that_are_widened_by_permutes() -> None:
    """Normed and gated on the way, without a spill; a matrix is widened to 16 bits without one too."""
    x, values = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(28672, 4096, dtype=torch.int8)
    row, scales = Unnormed(x, x[0], 1e-5), torch.zeros(28672)
    long, narrow = torch.zeros(1, 14336, dtype=torch.bfloat16), torch.zeros(4096, 14336, dtype=torch.int8)
    with offline() as kernels:
        gemv.gemv(long, narrow, scales=scales[:4096], add=x, dtype=torch.bfloat16)
        gemv.gemv(x, values[:4096], scales=scales[:4096], add=x, dtype=torch.bfloat16)
        gemv.gemv(row, values, scales=scales, dtype=torch.bfloat16, gated=True)
        widen.int8(values, scales, dtype=torch.bfloat16)
        widen.int4(four_bits(28672, 4096, 32, symmetric=False), dtype=torch.bfloat16)
    found = [described(kernel) for kernel in kernels]
    assert [each.spilled_bytes for each in found] == [0] * 5
    assert "prmt.b32" in found[0].ptx and "cvt.rn.f32.s" not in found[0].ptx
    assert not re.search(r"ld\.global(\.\w+)*\.[bsu]8\b", found[0].ptx)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("group", [32, 128])
def test_one_row_meets_four_bits_that_are_widened_by_masks(group: int) -> None:
    """Four words at a time and more, without a spill; not one number is converted but those of the row."""
    x, long = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(1, 14336, dtype=torch.bfloat16)
    with offline() as kernels:
        gemv4.gemv(Unnormed(x, x[0], 1e-5), four_bits(28672, 4096, group, symmetric=True), gated=True)
        gemv4.gemv(long, four_bits(4096, 14336, group, symmetric=False), add=x)
    for each in map(described, kernels):
        assert each.spilled_bytes == 0 and each.shared_bytes <= 227 << 10
        assert "lop3.b32" in each.ptx and "cvt.rn.f32.s" not in each.ptx
        assert "ld.global.v4.b32" in each.ptx and not re.search(r"ld\.global(\.\w+)*\.[bsu]8\b", each.ptx)


@pytest.fixture(scope="module", params=[LLAMA_8B, SMOLLM], ids=["llama-8b", "smollm2-135m"])
def eight_bits(request: pytest.FixtureRequest) -> dict[KVFormat, dict[str, Compiled]]:
    """The kernels that write and read keys and values in 8 bits; of attention that of decodes, that of prompts, and that of prompts whose
    pages are widened."""
    heads, kv_heads, head_dim = (request.param[name] for name in ("heads", "kv_heads", "head_dim"))
    angles = Angles(torch.zeros(ROWS, 1, head_dim), torch.zeros(ROWS, 1, head_dim))
    projected = torch.zeros(ROWS, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16)
    slots, found = torch.zeros(ROWS, dtype=torch.int64), {}
    for format in (KVFormat.FP8_E4M3, KVFormat.INT8):
        shape = KVShape(2, kv_heads, head_dim, torch.bfloat16)
        cache = KVCache(shape, num_blocks=4, block_size=64, formats=[format] * 2)
        with offline() as kernels, pytest.MonkeyPatch.context() as patch:
            patch.setattr(pages, "overlapped", lambda _: {"OVERLAP": True, "launch_pdl": True})
            qkv.prepare(projected, angles, cache, 1, slots, heads=heads, norm_weights=None, eps=1e-5)
            launch_attention(cache, heads=heads, chunks=(64, 1024))
        meant = ("_prepare", "_attend_decodes", "_attend_prompts", "_widen_pages")
        named = [each for each in map(described, kernels) if each.name in meant]
        names = ("prepare", "decode", "decode in turns", "prefill", "widen", "prefill of widened")
        found[format] = dict(zip(names, named, strict=True))
    return found


@pytest.mark.timeout(300)
def test_8_bits_are_read_in_wide_loads_and_spill_nothing(eight_bits: dict[KVFormat, dict[str, Compiled]]) -> None:
    """Sixteen bytes at a time, values that lie by dimension too; prompts still by wgmma."""
    for kernels in eight_bits.values():
        assert [each.name for each in kernels.values() if each.spilled_bytes] == []
        assert "wgmma" in kernels["prefill"].ptx
        assert [name for name, each in kernels.items() if re.search(r"ld\.global(\.\w+)*\.[bsu]8\b", each.ptx)] == []
        for name in kernels.keys() - {"prepare", "widen"}:
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", kernels[name].ptx)
            assert copies.count("0x10") >= 4


@pytest.mark.timeout(300)
def test_8_bits_are_widened_more_than_one_at_a_time(eight_bits: dict[KVFormat, dict[str, Compiled]]) -> None:
    """fp8 by the instruction for pairs, int8 by byte permutes."""
    for name in ("decode", "prefill"):
        assert "cvt.rn.f16x2.e4m3x2" in eight_bits[KVFormat.FP8_E4M3][name].ptx
        assert "prmt.b32" in eight_bits[KVFormat.INT8][name].ptx
        assert "cvt.rn.f16.s16" not in eight_bits[KVFormat.INT8][name].ptx


@pytest.mark.timeout(300)
def test_pages_are_widened_in_wide_loads_and_stores(eight_bits: dict[KVFormat, dict[str, Compiled]]) -> None:
    """All of a page sixteen bytes at a time, both ways, behind the kernel that writes it."""
    for kernels in eight_bits.values():
        widen = kernels["widen"]
        assert set(re.findall(r"st\.global\.(\S+)", widen.ptx)) == {"v4.b32"}
        assert widen.ptx.count("ld.global.v4.b32") >= 4
        assert widen.ptx.count("griddepcontrol.wait") == 1
        assert widen.registers <= 128


@pytest.mark.timeout(300)
def test_two_ways_in_one_kernel_take_the_room_of_one(eight_bits: dict[KVFormat, dict[str, Compiled]]) -> None:
    """Two programs share a multiprocessor: each has half of its registers and of its shared memory, 1 KiB of which is not the
    program's."""
    for kernels in eight_bits.values():
        both = kernels["prefill of widened"]
        assert "wgmma" in both.ptx
        assert both.registers <= 256 and 2 * (both.shared_bytes + 1024) <= 228 << 10
