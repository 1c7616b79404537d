"""Other tilings beside those that serve: which are faster on this machine, and whether they are right.

A `Search` goes along its axes one after the other, from the setting where it starts: of an axis every combination is
tried with the best that was found before. Kernels of an axis are compiled side by side before they are timed. What
a setting computes is compared with the specification in float32 first; one that is wrong, or that does not run, is named and is
never the best.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError

from benchmarks.kernels.costs import Load, product_cost
from benchmarks.kernels.shape import Shape
from benchmarks.kernels.timing import compiled_ahead, copies, seconds_a_call
from benchmarks.report import Cell, Report
from services.engine.kv_format import KVFormat
from services.engine.models.spec import MoESpec
from services.engine.ops import attention, moe
from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.int4 import MOST_ROWS
from services.engine.ops.kernels import (
    bulk,
    bulk_hopper,
    decode_attention,
    gemv,
    gemv4,
    grouped,
    int4,
    prefill_attention,
    scaled,
    skinny,
    widen,
)
from services.engine.ops.kernels import moe as moe_kernels
from services.engine.ops.linear import in_dtype
from services.engine.ops.quantize import by_torch, dequantize
from services.engine.quant.matrix import Scheme, nearest

Setting = Mapping[str, Any]
"""Whole numbers by name."""

MOST_ERROR = 0.02
"""How far a row may be off, beside its length: ten times what bfloat16 rounds."""
SHARED_BYTES = 227 << 10
"""Of a multiprocessor, for a program."""
MOST_SUMS = 160
"""Registers of a thread for what is added up."""
FEW_COPIES = 8
"""Of weights: enough where each is large, and others are cheap to read."""


@dataclass(frozen=True, slots=True)
class Search:
    """One kernel in one step."""

    name: str
    load: Load
    serving: str
    """What serves today: the label of the start, or a name in `others`."""
    start: Setting
    axes: Sequence[Mapping[str, Sequence[int]]]
    calls: Callable[[Setting], Sequence[Callable[[], Tensor]]]
    expected: Callable[[], Tensor]
    """What the first call is to give."""
    under: Callable[[Setting], AbstractContextManager[None]] = lambda _: nullcontext()
    """Where calls are made and run."""
    fits: Callable[[Setting], bool] = lambda _: True
    others: Mapping[str, Sequence[Callable[[], Tensor]]] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """What a search found."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of everything that is right."""
    refused: dict[str, str] = field(default_factory=dict)
    """And what is not, and why."""

    @property
    def best(self) -> str | None:
        return min(self.seconds, key=self.seconds.__getitem__, default=None)


def label(setting: Setting) -> str:
    """`chunk 192 warps 2 stages 3`"""
    return " ".join(f"{name} {value}" for name, value in setting.items())


@contextmanager
def replaced(module: ModuleType, **values: object) -> Iterator[None]:
    """A module's tables with these in their place, within the block."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def distance(found: Tensor, expected: Tensor) -> float:
    """Of the row that is farthest off: how far, beside its length. NaN where anything is."""
    found, expected = (x.float().flatten(1) for x in (found, expected))
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)).max())


def explore(search: Search, device: torch.device, *, until: float) -> Found:
    """Tries everything, as long as it is earlier than that on the monotonic clock."""
    found, expected = Found(), search.expected()

    def attempt(name: str, make: Callable[[], Sequence[Callable[[], Tensor]]]) -> None:
        try:
            calls = make()
            error = distance(calls[0](), expected)
            if not error <= MOST_ERROR:
                found.refused[name] = f"off by {error:.3f}"
                return
            found.seconds[name] = seconds_a_call(calls, device)
        except torch.AcceleratorError:
            raise  # the device is of no use any more
        except (RuntimeError, ValueError, AssertionError, TritonError) as error:
            found.refused[name] = f"{type(error).__name__}: {str(error)[:80]}"

    for name, calls in search.others.items():
        attempt(name, lambda calls=calls: calls)  # type: ignore[misc]
    settings = {label(search.start): search.start}
    for axis in ({}, *search.axes):
        best = min((each for each in settings if each in found.seconds), key=found.seconds.__getitem__, default=None)
        near = search.start if best is None else settings[best]
        steps = ({**near, **dict(zip(axis, values, strict=True))} for values in product(*axis.values()))
        fresh = {label(step): step for step in steps if search.fits(step)}
        fresh = {name: step for name, step in fresh.items() if name not in found.seconds | found.refused}
        settings |= fresh
        if device.type == "cuda":
            _compile(search, fresh.values())
        for name, step in fresh.items():
            if time.monotonic() > until:
                found.refused[name] = "no time left"
                continue
            with search.under(step):
                attempt(name, partial(search.calls, step))
    return found


def _compile(search: Search, settings: Iterable[Setting]) -> None:
    with compiled_ahead():
        for setting in settings:
            with search.under(setting), suppress(Exception):  # which says so when it is tried
                search.calls(setting)[0]()


def searches(shape: Shape, loads: Sequence[Load]) -> Iterator[Search]:
    """Everything that has a table, what a step takes longest for first."""
    decodes, prefills = ([load for load in loads if load.is_decode is wanted] for wanted in (True, False))
    for format in KVFormat:
        yield from (decode_search(shape, load, format) for load in decodes)
    dense = shape.spec.moe is None or len(shape.spec.moe.layers) < shape.spec.layers
    for form in shape.formats:
        for name, outputs, inputs in shape.matrices():
            if dense or name in ("qkv", "o"):
                yield from product_searches(shape, loads, name, outputs, inputs, form)
    if shape.spec.moe is not None:
        yield from experts_searches(shape, loads, shape.spec.moe)
    for format in KVFormat:
        yield from (prefill_search(shape, load, format) for load in prefills)


def decode_search(shape: Shape, load: Load, format: KVFormat) -> Search:
    """Decode attention: how long a chunk, and how a program runs."""
    itemsize = 1 if format.is_quantized else 2
    start = decode_attention.tuning(load.sequences, shape.spec.kv_heads, itemsize)._asdict()
    calls, expected = _attention(shape, load, format)
    return Search(
        f"attention {format}",
        load,
        label(start),
        start,
        [{"chunk": (128, 192, 256, 384, 512, 768, 1280, 4096)}, {"warps": (1, 2, 4), "stages": (2, 3, 4)}],
        lambda _: calls(),
        expected,
        under=lambda each: replaced(
            decode_attention, TUNING={itemsize: {sys.maxsize: decode_attention.Tuning(**each)}}
        ),
    )


def prefill_search(shape: Shape, load: Load, format: KVFormat) -> Search:
    """Prefill attention: tiles of queries and of keys."""
    itemsize = 1 if format.is_quantized else 2
    start = prefill_attention.TUNING[itemsize]._asdict()
    calls, expected = _attention(shape, load, format)
    return Search(
        f"attention {format}",
        load,
        label(start),
        start,
        [{"rows": (64, 128), "warps": (4, 8)}, {"keys": (32, 64), "stages": (2, 3, 4)}],
        lambda _: calls(),
        expected,
        under=lambda each: replaced(prefill_attention, TUNING={itemsize: prefill_attention.Tuning(**each)}),
    )


def _attention(
    shape: Shape, load: Load, format: KVFormat
) -> tuple[Callable[[], list[Callable[[], Tensor]]], Callable[[], Tensor]]:
    """The kernels' calls by a new plan, and what the specification gives. A sink that weighs nothing leads there on a
    GPU too."""
    spec = shape.spec
    cache, batch = shape.paged(format, load)
    q = shape.noise(load.tokens, spec.heads, spec.head_dim)
    scale, window = spec.head_dim**-0.5, spec.windows[0]

    def calls() -> list[Callable[[], Tensor]]:
        plan = attention.plan(batch, cache).kernels
        layers = range(cache.shape.layers)
        return [partial(plan.attend, q, cache, layer, scale=scale, window=window) for layer in layers]

    def expected() -> Tensor:
        sinks = torch.full((spec.heads,), -torch.inf, device=shape.device)
        plan = attention.plan(batch, cache)
        return attention.paged_attention(q, cache, 0, plan, scale=scale, window=window, sinks_H=sinks)

    return calls, expected


def product_searches(
    shape: Shape, loads: Sequence[Load], name: str, outputs: int, inputs: int, form: str
) -> Iterator[Search]:
    """Products of a matrix by the kernels of ours, beside what torch has: in bfloat16 that serves from 33 rows on, of fp8 from 65 or 257."""
    count = min(FEW_COPIES, copies(product_cost(0, outputs, inputs, form=form).bytes_, shape.device))
    plain = [shape.noise(outputs, inputs, size=0.02) for _ in range(count)]
    matrices = Matrices(plain, [skinny.counters_of(weight) for weight in plain], form)
    for load in loads:
        most = {"w4a16": MOST_ROWS}.get(form, scaled.MOST_ROWS)
        if load.tokens == 1 and form in ROUNDED and gemv.is_supported(matrices.kept(0)):
            yield _row_search(shape, load, name, matrices)
        elif load.tokens == 1 and form == "w4a16" and gemv4.is_supported(matrices.four[0], torch.bfloat16):
            yield _row_search_in_four_bits(shape, load, name, matrices)
        elif load.tokens > scaled.MOST_ROWS and form in ROUNDED:
            yield _many_rows_search(shape, load, name, matrices, bulk, BULK_AXES, _bulk_fits)
            if bulk_hopper.is_able(shape.device):
                yield _many_rows_search(shape, load, name, matrices, bulk_hopper, HOPPER_AXES, _hopper_fits)
        elif (form == "w4a16" or load.tokens > 1) and load.tokens <= most:
            yield _rows_search(shape, load, name, matrices)


class Matrices:
    """Of one shape, in one form."""

    def __init__(self, plain: Sequence[Tensor], counters: Sequence[Tensor], form: str) -> None:
        self.plain, self.counters, self.form = plain, counters, form
        self.eight = [by_torch(each, ROUNDED[form]) for each in plain] if form in ROUNDED else []
        self.four = [_four_bits(each) for each in plain] if form == "w4a16" else []

    def kept(self, index: int) -> Tensor:
        """As it lies."""
        return (
            self.four[index].weight_OW
            if self.four
            else self.eight[index].values_NI
            if self.eight
            else self.plain[index]
        )

    def exact(self) -> Tensor:
        """What the first stands for."""
        if self.four:
            return widen.int4(self.four[0], dtype=torch.float32)
        return dequantize(self.eight[0], ROUNDED[self.form]) if self.eight else self.plain[0]


ROUNDED = {"fp8": RowScaled(torch.float8_e4m3fn), "w8a8": RowScaled(torch.int8)}
"""Forms of eight bits, on both sides."""


def _four_bits(weight: Tensor) -> int4.Packed:
    matrix = nearest(weight, Scheme(4, tile=(1, 128)))
    return int4.packed(matrix.values_OI, matrix.scales_TU, None, dtype=weight.dtype)


def _row_search(shape: Shape, load: Load, name: str, matrices: Matrices) -> Search:
    """A single row, which keeps its 16 bits."""
    x, (outputs, columns) = shape.noise(1, matrices.plain[0].shape[1]), matrices.kept(0).shape
    start = gemv.tile_of(matrices.kept(0))._asdict()
    calls = [partial(gemv.gemv, x, eight.values_NI, scales=eight.scales_N) for eight in matrices.eight]
    return Search(
        f"{name} {matrices.form}",
        load,
        label(start),
        start,
        [{"rows": (2, 4, 8, 16), "columns": (512, 1024, 2048, 4096)}, {"side": (8, 16)}, {"warps": (4, 8), "stages": (2, 3, 4)}],
        partial(_always, calls),
        partial(_product, x, matrices.exact()),
        under=lambda each: replaced(gemv, tile_of=lambda _: gemv.Tile(**each)),
        fits=lambda each: outputs % each["rows"] == 0 and columns % each["columns"] == 0,
    )  # fmt: skip


def _row_search_in_four_bits(shape: Shape, load: Load, name: str, matrices: Matrices) -> Search:
    x, (outputs, words) = shape.noise(1, matrices.plain[0].shape[1]), matrices.kept(0).shape
    start = gemv4.tile_of(matrices.four[0])._asdict()
    return Search(
        f"{name} {matrices.form}",
        load,
        label(start),
        start,
        [{"rows": (4, 8, 16, 32), "words": (256, 512, 1024)}, {"warps": (2, 4, 8), "stages": (2, 3, 4)}],
        partial(_always, [partial(gemv4.gemv, x, four) for four in matrices.four]),
        partial(_product, x, matrices.exact()),
        under=lambda each: replaced(gemv4, tile_of=lambda _: gemv4.Tile(**each)),
        fits=lambda each: outputs % each["rows"] == 0 and words % each["words"] == 0,
    )  # fmt: skip


def _rows_search(shape: Shape, load: Load, name: str, matrices: Matrices) -> Search:
    (outputs, inputs), form = matrices.plain[0].shape, matrices.form
    x = shape.noise(load.tokens, inputs)
    lines = skinny.padded(load.tokens)
    axes: list[Mapping[str, Sequence[int]]] = [
        # Taller tiles read x less often and want more programs for each: one is of no use without the other.
        {"rows": (64, 128), "split": (1, 2, 4), "warps": (4, 8)},
        {"columns": (64, 128) if form == "bf16" else (128, 256)},
        {"stages": (3, 4, 6)},
    ]
    if form == "w4a16":
        start = int4.tiling_of(outputs, inputs // int4.SPAN, lines)._asdict()
        serving = label(start)
        if lines > 64:
            # Large tiles fit with few columns alone: from there on they are tried.
            start |= {"spans": 1, "stages": 2, "split": 1}
        blocks = sorted({min(lines, size) for size in (64, 128, 256)})
        axes = [
            {"rows": (64, 128, 256), "block": blocks, "warps": (4, 8)},
            {"spans": (1, 2), "stages": (2, 3, 4, 5)},
            {"split": (1, 2, 4)},
        ]
        calls = partial(_skinny4, x, matrices)
        others = {"cuBLAS": [partial(_widened4, x, four) for four in matrices.four]}
        expected = partial(_product, x, matrices.exact())
    elif form in ROUNDED:
        x8, cut = by_torch(x, ROUNDED[form]), scaled.tiling(outputs, inputs, lines)
        start = cut._asdict()
        serving = label(start) if form == "w8a8" or load.tokens <= scaled.most_rows(outputs) else "cuBLAS"
        calls = partial(_skinny8, x8, matrices)
        others = {"cuBLAS": [partial(CUBLAS[form], x8, weight) for weight in matrices.eight]}
        expected = partial(_product, dequantize(x8, ROUNDED[form]), matrices.exact())
    else:
        split = skinny.split_of(matrices.plain[0])
        start = {"rows": 64, "columns": 128 if lines <= 64 else 64, "split": split or 1, "warps": 4, "stages": 4}
        serving = label(start) if split and load.tokens <= skinny.MOST_ROWS else "cuBLAS"
        calls = partial(_skinny16, x, matrices)
        others = {"cuBLAS": [partial(F.linear, x, weight) for weight in matrices.plain]}
        expected = partial(_product, x, matrices.exact())
    return Search(
        f"{name} {form}", load, serving, start, axes, calls, expected,
        fits=partial(_product_fits, outputs, inputs, lines, 1 if form in ROUNDED else 2), others=others,
    )  # fmt: skip


def _many_rows_search(
    shape: Shape,
    load: Load,
    name: str,
    matrices: Matrices,
    kernel: ModuleType,
    axes: Sequence[Mapping[str, Sequence[int]]],
    fits: Callable[[Setting], bool],
) -> Search:
    """Rows and a matrix in eight bits, of which the GPU's own rate is the bound, by `bulk` or what takes its place."""
    (outputs, inputs), form = matrices.plain[0].shape, matrices.form
    x8 = by_torch(shape.noise(load.tokens, inputs), ROUNDED[form])
    start = bulk.fitting(kernel.TILINGS, load.tokens, outputs, bulk.multiprocessors(shape.device))._asdict()
    return Search(
        f"{name} {kernel.__name__.rpartition('.')[2]} {form}",
        load,
        label(start) if form == "w8a8" else "cuBLAS",
        start,
        axes,
        partial(_bulk8, x8, matrices, kernel),
        partial(_product, dequantize(x8, ROUNDED[form]), matrices.exact()),
        fits=fits,
        others={
            "cuBLAS": [partial(CUBLAS[form], x8, weight) for weight in matrices.eight],
            "skinny": _skinny8(x8, matrices, scaled.WIDE._asdict()),
        },
    )


BULK_AXES: Sequence[Mapping[str, Sequence[int]]] = [
    {"rows": (64, 128, 256), "columns": (128, 256), "persistent": (False, True), "warps": (4, 8), "stages": (3, 4)},
    {"depth": (64, 128), "stages": (3, 4, 6)},
    {"group": (8, 16, 32)},
]
HOPPER_AXES: Sequence[Mapping[str, Sequence[int]]] = [
    {"rows": (64, 128), "columns": (128, 256), "shared": (False, True), "stages": (4, 5, 6)},
    {"depth": (64, 128), "stages": (3, 6, 8)},
    {"group": (8, 16, 32)},
]


def _bulk_fits(each: Setting) -> bool:
    """Whether a tile is as large as its warps want it, and leaves room for its result, and for as much that is added, where the next tile's
    operands come meanwhile."""
    beside = 2 * each["rows"] * bulk.STORED if each["persistent"] else 0
    shared: int = each["stages"] * each["depth"] * (each["rows"] + each["columns"]) + beside
    sums: int = each["rows"] * each["columns"] // (32 * each["warps"])
    tall: bool = each["rows"] >= 16 * each["warps"]
    return tall and shared < SHARED_BYTES and 64 <= sums <= MOST_SUMS


def _hopper_fits(each: Setting) -> bool:
    """The same of two groups of four warps, each with room for a result, beside the barriers."""
    rows = each["rows"] * (2 if each["shared"] else 1)
    shared: int = each["stages"] * each["depth"] * (rows + each["columns"]) + 2 * each["rows"] * bulk.STORED
    sums: int = each["rows"] * each["columns"] // 128
    return shared + 1024 < SHARED_BYTES and sums <= MOST_SUMS


def _bulk8(x: Quantized, matrices: Matrices, kernel: ModuleType, each: Setting) -> list[Callable[[], Tensor]]:
    cut = kernel.Tiling(**each)
    return [
        partial(
            kernel.matmul, x.values_NI, weight.values_NI, x.scales_N, weight.scales_N, dtype=torch.bfloat16, cut=cut
        )
        for weight in matrices.eight
    ]


def _product_fits(outputs: int, inputs: int, lines: int, width: int, each: Setting) -> bool:
    """Whether the matrix falls into these tiles, and they into a multiprocessor."""
    block = each.get("block", lines)
    columns = each["spans"] * int4.SPAN if "spans" in each else each["columns"]
    falls = outputs % each["rows"] == 0 and inputs % (columns * each["split"]) == 0
    tile = {"rows": each["rows"], "columns": columns, "stages": each["stages"], "warps": each["warps"]}
    # Shares are those of one block. A matrix in four bits takes a quarter of the room.
    held = each["rows"] // 4 if "spans" in each else each["rows"]
    return falls and (each["split"] == 1 or block >= lines) and _tile_fits(tile, held=held, beside=block, width=width)


def _tile_fits(each: Setting, *, beside: int, width: int, held: int | None = None) -> bool:
    """Whether a tile of a matrix, and so many columns of what it is multiplied with, leave room in a multiprocessor."""
    shared: int = each["stages"] * each["columns"] * ((held or each["rows"]) + beside) * width
    sums: int = each["rows"] * beside
    return shared <= SHARED_BYTES and sums <= MOST_SUMS * 32 * each["warps"]


def _skinny16(x: Tensor, matrices: Matrices, each: Setting) -> list[Callable[[], Tensor]]:
    return [
        partial(skinny.matmul, x, weight, counters=counter, **each)
        for weight, counter in zip(matrices.plain, matrices.counters, strict=True)
    ]


def _skinny8(x: Quantized, matrices: Matrices, each: Setting) -> list[Callable[[], Tensor]]:
    return [
        partial(
            skinny.matmul, x.values_NI, weight.values_NI, counters=counter,
            dtype=torch.bfloat16, scales=(x.scales_N, weight.scales_N), **each,
        )
        for weight, counter in zip(matrices.eight, matrices.counters, strict=True)
    ]  # fmt: skip


def _skinny4(x: Tensor, matrices: Matrices, each: Setting) -> list[Callable[[], Tensor]]:
    tiling = int4.Tiling(**each)
    return [partial(int4.matmul, x, four, dtype=torch.bfloat16, tiling=tiling) for four in matrices.four]


def _widened4(x: Tensor, four: int4.Packed) -> Tensor:
    return in_dtype(x, widen.int4(four, dtype=x.dtype), bias_O=None, add=None, dtype=x.dtype)


def _cublas_fp8(x: Quantized, weight: Quantized) -> Tensor:
    return torch._scaled_mm(
        x.values_NI,
        weight.values_NI.t(),
        scale_a=x.scales_N[:, None],
        scale_b=weight.scales_N[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _cublas_int8(x: Quantized, weight: Quantized) -> Tensor:
    sums = torch._int_mm(x.values_NI, weight.values_NI.t())
    return (sums * x.scales_N[:, None] * weight.scales_N).bfloat16()


CUBLAS = {"fp8": _cublas_fp8, "w8a8": _cublas_int8}


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().t()


def experts_searches(shape: Shape, loads: Sequence[Load], spec: MoESpec) -> Iterator[Search]:
    """Mixtures: how many pairs a tile has, and its part of a matrix."""
    stacks = [_stacked(shape, spec) for _ in range(2)]
    for load in loads:
        x, logits = shape.noise(load.tokens, shape.spec.hidden), shape.noise(load.tokens, spec.num_experts)
        mix = partial(moe_kernels.mixture, x, logits, top_k=spec.top_k, normalize=spec.normalize, add=None)
        calls = [partial(mix, experts) for experts in stacks]
        num_pairs = load.tokens * spec.top_k
        pairs = moe_kernels.tile_rows(num_pairs, spec.num_experts)
        tile = next(tile for most, tile in grouped.TILES.items() if pairs <= most)
        start = {"pairs": pairs, **tile._asdict()}
        is_few = moe_kernels.is_few(num_pairs, spec.num_experts)
        yield Search(
            "experts",
            load,
            "pair by pair" if is_few else label(start),
            start,
            [
                {"pairs": (16, 32, 64, 128)},
                {"rows": (64, 128, 256), "columns": (64, 128)},
                {"warps": (4, 8), "stages": (3, 4)},
            ],
            partial(_always, calls),
            partial(_mixed, x, logits, stacks[0], spec),
            under=_grouped_so,
            fits=_experts_fit,
            others={"pair by pair": calls} if is_few else {},
        )


def _stacked(shape: Shape, spec: MoESpec) -> moe.Experts:
    """A layer's experts as a GPU has them, whatever the device."""
    (gate_up, down), count = shape.stacks(spec), spec.num_experts
    return moe.Experts((gate_up,), (down,), 0, count, count)


def _always(calls: Sequence[Callable[[], Tensor]], _: Setting) -> Sequence[Callable[[], Tensor]]:
    return calls


@contextmanager
def _grouped_so(each: Setting) -> Iterator[None]:
    """Experts by groups, so many pairs and such a part of a matrix at a time."""
    pairs, tile = each["pairs"], {name: value for name, value in each.items() if name != "pairs"}
    with (
        replaced(moe_kernels, tile_rows=lambda *_: pairs, is_few=lambda *_: False),
        replaced(grouped, TILES={pairs: grouped.Tile(**tile)}),
    ):
        yield


def _experts_fit(each: Setting) -> bool:
    return _tile_fits(each, beside=each["pairs"], width=2)


def _mixed(x: Tensor, logits: Tensor, experts: moe.Experts, spec: MoESpec) -> Tensor:
    """By the specification, which has a matrix for each expert."""
    (gate_up,), (down,) = experts.gate_up, experts.down
    apart = moe.Experts(gate_up.unbind(), down.unbind(), 0, spec.num_experts, spec.num_experts)
    return moe.mix(x, *moe.route(logits, top_k=spec.top_k, normalize=spec.normalize), apart)


def tune(
    shape: Shape, loads: Sequence[Load], report: Report, name: str, *, limit: float, only: re.Pattern[str]
) -> None:
    """Adds the table of one shape, of the kernels whose names match, within about so many seconds; every search is printed
    as soon as it is done."""
    until, rows = time.monotonic() + limit, list[list[Cell]]()
    for search in searches(shape, loads):
        if not only.search(search.name):
            continue
        if time.monotonic() > until:
            print(f"{name} {search.load} {search.name}: no time left", flush=True)
            continue
        found = explore(search, shape.device, until=until)
        serving, best = found.seconds.get(search.serving), found.best
        least = None if best is None else found.seconds[best]
        gain = None if serving is None or least is None else serving / least
        micro = [None if each is None else each * 1e6 for each in (serving, least)]
        rows.append([str(search.load), search.name, search.serving, micro[0], best, micro[1], gain, len(found.refused)])
        print(f"\n{name} {search.load} {search.name}, serving: {search.serving}")
        for each, seconds in sorted(found.seconds.items(), key=lambda item: item[1]):
            print(f"  {seconds * 1e6:9.2f} µs  {each}")
        for each, why in found.refused.items():
            print(f"  refused: {each}: {why}")
        sys.stdout.flush()
    columns = ["step", "kernel", "serving", "µs", "best", "µs", "times as fast", "refused"]
    report.table(f"{name}: tilings", columns, rows)
