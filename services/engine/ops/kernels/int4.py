"""Rows in two parts of eight bits times a matrix in four bits.

The kernel is that of `skinny`, but for what it does with a tile of the matrix: numbers of four bits are widened to eight in the
registers of whoever multiplies them, and whole sums of a group of inputs are multiplied with the group's scale. A few rows are bound by
reading the matrix, and two parts of each cost nothing there.

Bytes hold two inputs each that lie half a span apart: a group, of 64 inputs at least. What offsets bring is a sum of the inputs of a
group, which whoever rounded them has taken.

Shapes: O outputs, I inputs, B bytes of two inputs, G groups of inputs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Quantized
from services.engine.ops.kernels import skinny
from services.engine.ops.kernels.bits import nibbles
from services.engine.ops.kernels.overlap import overlapped, wait


class Packed(NamedTuple):
    """A matrix as the kernels want it."""

    weight_OB: Tensor
    """int8."""
    scales_GO: Tensor
    offsets_GO: Tensor | None
    """None where all are zero."""
    counters: Tensor
    group: int
    """So many inputs share a scale."""
    inputs: int
    """Those that are there; spans are filled up with zeros."""


class Tiling(NamedTuple):
    """How a product is cut: as `scaled.Tiling`, with so many spans of columns."""

    block: int
    rows: int
    spans: int
    split: int
    warps: int
    stages: int


def span_of(group: int) -> int:
    """How many inputs lie in a run of bytes, the first half of them in the low bits."""
    return max(64, group)


def packed(values_OI: Tensor, scales_OG: Tensor, offsets_OG: Tensor | None, *, dtype: torch.dtype) -> Packed:
    """Values from -8 to 7 that stand for value * scale + offset, a scale for each 32, 64 or 128 of them; scales and offsets are kept
    in `dtype`."""
    (outputs, inputs), group = values_OI.shape, values_OI.shape[1] // scales_OG.shape[1]
    assert group in (32, 64, 128) and inputs % group == 0
    span = span_of(group)
    missing = -inputs % span
    low, high = F.pad(values_OI, (0, missing)).view(outputs, -1, 2, span // 2).unbind(2)
    terms = [
        None if each is None else F.pad(each, (0, missing // group)).t().to(dtype).contiguous()
        for each in (scales_OG, offsets_OG)
    ]
    assert terms[0] is not None
    weight_OB = ((low & 15) | (high << 4)).view(outputs, -1)
    return Packed(weight_OB, terms[0], terms[1], skinny.counters_of(weight_OB), group, inputs)


def matmul(
    x: Quantized,
    matrix: Packed,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Tensor:
    """x @ weight.T + bias + add, [N, O]. x has two parts, and sums of groups where there are offsets."""
    (lines, inputs), num_rows, outputs = x.values_NI.shape, x.scales_N.shape[0], matrix.scales_GO.shape[1]
    assert lines == 2 * num_rows and inputs == matrix.inputs
    cut = tiling or tiling_of(outputs, matrix.weight_OB.shape[1] * 2 // span_of(matrix.group), skinny.padded(lines))
    num_blocks = triton.cdiv(lines, cut.block)
    assert cut.split == 1 or num_blocks == 1
    device = x.scales_N.device
    out = torch.empty((num_rows, outputs), dtype=dtype, device=device)
    shares = torch.empty(
        (cut.split, cut.block // 2, outputs) if cut.split > 1 else 0, dtype=torch.float32, device=device
    )
    _matmul[(triton.cdiv(outputs, cut.rows) * num_blocks, cut.split)](
        x.values_NI,
        x.sums_GN,
        matrix.weight_OB,
        matrix.scales_GO,
        matrix.offsets_GO,
        out,
        out if bias_O is None else bias_O,
        out if add is None else add,
        shares,
        matrix.counters,
        x.scales_N,
        num_rows,
        O=outputs,
        I=inputs,
        GROUP=matrix.group,
        SPAN=span_of(matrix.group),
        M=cut.block,
        ROWS=cut.rows,
        SPANS=cut.spans,
        SPLIT=cut.split,
        MANY=num_blocks > 1,
        BIAS=bias_O is not None,
        ADD=add is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **overlapped(out),
    )
    return out


@cache
def tiling_of(outputs: int, spans: int, padded_rows: int) -> Tiling:
    """For so many rows of x, with their parts, and a matrix of so many spans of columns (not measured yet; the rows, warps, stages and
    programs are those that served a kernel of this kind best on an H200)."""
    block = min(padded_rows, 128)
    most_split = skinny.programs_for(outputs) if padded_rows <= 64 else 1
    split = next(split for split in (4, 2, 1) if split <= most_split and spans % split == 0)
    at_once = 2 if block <= 64 and spans % (2 * split) == 0 else 1
    return Tiling(block, 64, at_once, split, warps=4, stages=4)


@triton.jit
def _matmul(
    x,
    sums,
    weight,
    scales,
    offsets,
    out,
    bias,
    add,
    shares,
    counters,
    scales_x,
    num_rows,
    O: tl.constexpr,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    SPLIT: tl.constexpr,
    MANY: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PARTS: tl.constexpr = 2
    HALF: tl.constexpr = SPAN // 2
    ALL: tl.constexpr = (I + SPAN - 1) // SPAN
    SHARE: tl.constexpr = ALL // SPLIT
    tile, block = skinny.placed(num_rows, O, M, ROWS, PARTS, MANY)
    output = skinny.outputs_of(tile, O, ROWS)
    row, inside = skinny.rows_of(block, num_rows, M, PARTS, MANY)
    place = tl.arange(0, HALF)
    weights = weight + output.to(tl.int64)[:, None] * (ALL * HALF) + place[None, :]
    values = x + row[None, :] * I + place[:, None]
    first = tl.program_id(1) * SHARE
    wait(OVERLAP)
    total = tl.zeros((ROWS, M), tl.float32)
    for start in tl.range(0, SHARE, SPANS):
        for step in tl.static_range(SPANS):
            span = first + start + step
            both = tl.load(weights + span * HALF)
            low = _columns(values, place, inside, span * SPAN, I, SPAN)
            high = _columns(values, place, inside, span * SPAN + HALF, I, SPAN)
            found = tl.dot(nibbles(both, False), low, out_dtype=tl.int32)
            if GROUP == SPAN:
                found = tl.dot(nibbles(both, True), high, found, out_dtype=tl.int32)
                total = _taken_in(total, found, span, scales, offsets, sums, output, row, num_rows, O, I, GROUP)
            else:
                total = _taken_in(total, found, 2 * span, scales, offsets, sums, output, row, num_rows, O, I, GROUP)
                found = tl.dot(nibbles(both, True), high, out_dtype=tl.int32)
                total = _taken_in(total, found, 2 * span + 1, scales, offsets, sums, output, row, num_rows, O, I, GROUP)
    skinny.finish(
        total, tile, block, out, bias, add, shares, counters, scales_x, None, num_rows,
        O, M, ROWS, SPLIT, PARTS, MANY, BIAS, ADD,
    )  # fmt: skip


@triton.jit
def _columns(values, place, inside, start, I: tl.constexpr, SPAN: tl.constexpr):
    """Of x, half a span from this column on."""
    there = inside[None, :] if I % SPAN == 0 else inside[None, :] & (start + place < I)[:, None]
    return tl.load(values + start, mask=there, other=0)


@triton.jit
def _taken_in(
    total, found, group, scales, offsets, sums, output, row, num_rows, O: tl.constexpr, I: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """With the sums of a group, of numbers that are sixteen times as large."""
    scale = tl.load(scales + group * O + output).to(tl.float32) * 0.0625
    total += found.to(tl.float32) * scale[:, None]
    if offsets is not None:
        # A row's sum counts with its first part.
        counts = (row < num_rows) & (group < I // GROUP)
        whole = tl.load(sums + group * num_rows + row, mask=counts, other=0.0)
        total += tl.load(offsets + group * O + output).to(tl.float32)[:, None] * whole[None, :]
    return total
