"""Rows in 16 bits times a matrix in four bits.

The product is computed as `skinny` does; but a tile of the matrix is widened to 16 bits, and multiplied with its scales, in the registers of
whoever multiplies it (as Frantar et al. 2024, "MARLIN", section 3.3).

A word of 16 bits holds four inputs that lie a plane apart: of every 128 inputs, a span, the word j has the inputs j, 32 + j,
64 + j and 96 + j, the first in its lowest bits. So a word stands where one number in 16 bits would, and gives four of them, each for
a dot of its own, by a shift and a mask. A plane has one scale for each output.

Shapes: O outputs, I inputs, W words of four inputs, T pairs of terms.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels import skinny
from services.engine.ops.kernels.bits import plane
from services.engine.ops.kernels.overlap import bytes_ahead, overlapped, prefetch, wait

SPAN, PLANE = 128, 32
"""Inputs that words share out among their places, and those of one place."""

_MANY_OUTPUTS = 16384
"""With so many, large tiles leave enough programs, and read x half as often."""
_FEW_TILES = 64
"""Of so many some programs share each, or all would be too few to have the memory's whole bandwidth."""


class Packed(NamedTuple):
    """A matrix as the kernels want it."""

    weight_OW: Tensor
    """int16: numbers from 0 to 15, which are 8 too large."""
    terms_TO2: Tensor
    """In the dtype of activations: the scales of two groups of a span; or the scale and the offset of one."""
    paired: bool
    """Whether they are scales of two groups. A group of a whole span has an offset, if only zero."""
    counters: Tensor
    group: int
    """So many inputs share a scale: 32, 64 or 128."""
    inputs: int
    """Those that are there; spans are filled up with zeros."""


class Tiling(NamedTuple):
    """How a product is cut: as `scaled.Tiling`, with so many spans of columns at a time."""

    block: int
    rows: int
    spans: int
    split: int
    warps: int
    stages: int


def packed(values_OI: Tensor, scales_OG: Tensor, offsets_OG: Tensor | None, *, dtype: torch.dtype) -> Packed:
    """Values from -8 to 7 that stand for value * scale + offset, a scale for each 32, 64 or 128 of them; scales and offsets are kept
    in `dtype`."""
    (outputs, inputs), group = values_OI.shape, values_OI.shape[1] // scales_OG.shape[1]
    assert group in (32, 64, 128) and inputs % group == 0
    planes = F.pad(values_OI.to(torch.int16) + 8, (0, -inputs % SPAN)).view(outputs, -1, SPAN // PLANE, PLANE)
    weight_OW = planes[:, :, 0].clone()
    for place in range(1, SPAN // PLANE):
        weight_OW |= planes[:, :, place] << 4 * place
    weight_OW = weight_OW.view(outputs, -1)
    num_groups = planes.shape[1] * SPAN // group
    paired = offsets_OG is None and group < SPAN
    terms = scales_OG[..., None]
    if not paired:
        terms = torch.stack((scales_OG, torch.zeros_like(scales_OG) if offsets_OG is None else offsets_OG), 2)
    terms_OT2 = F.pad(terms, (0, 0, 0, num_groups - scales_OG.shape[1])).reshape(outputs, -1, 2)
    terms_TO2 = terms_OT2.transpose(0, 1).to(dtype).contiguous()
    return Packed(weight_OW, terms_TO2, paired, skinny.counters_of(weight_OW), group, inputs)


def matmul(
    x_NI: Tensor,
    matrix: Packed,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Tensor:
    """x @ weight.T + bias + add, [N, O]. x and the matrix's terms are in the same 16 bits, to which weights are rounded."""
    (num_rows, inputs), outputs = x_NI.shape, len(matrix.weight_OW)
    assert inputs == matrix.inputs and x_NI.dtype == matrix.terms_TO2.dtype and x_NI.itemsize == 2
    cut = tiling or tiling_of(outputs, matrix.weight_OW.shape[1] // PLANE, skinny.padded(num_rows))
    num_blocks = triton.cdiv(num_rows, cut.block)
    assert cut.split == 1 or num_blocks == 1
    out = torch.empty((num_rows, outputs), dtype=dtype, device=x_NI.device)
    shares = torch.empty(
        (cut.split, cut.block, outputs) if cut.split > 1 else 0, dtype=torch.float32, device=x_NI.device
    )
    _matmul_int4[(triton.cdiv(outputs, cut.rows) * num_blocks, cut.split)](
        x_NI,
        matrix.weight_OW,
        matrix.terms_TO2.view(torch.int32),
        out,
        out if bias_O is None else bias_O,
        out if add is None else add,
        shares,
        matrix.counters,
        num_rows,
        O=outputs,
        I=inputs,
        GROUP=matrix.group,
        PAIRED=matrix.paired,
        SPAN=SPAN,
        PLANE=PLANE,
        M=cut.block,
        ROWS=cut.rows,
        SPANS=cut.spans,
        SPLIT=cut.split,
        MANY=num_blocks > 1,
        BIAS=bias_O is not None,
        ADD=add is not None,
        AHEAD=bytes_ahead(matrix.weight_OW.shape[1] * 2 // cut.split),
        num_warps=cut.warps,
        num_stages=cut.stages,
        **overlapped(out),
    )
    return out


@cache
def tiling_of(outputs: int, spans: int, padded_rows: int) -> Tiling:
    """For so many rows of x and a matrix of so many spans of columns (measured on an H200 with the matrices of Llama-3.1-8B, in groups of
    128). Programs share a tile where there are few."""
    if padded_rows > 64 and outputs >= _MANY_OUTPUTS:
        return Tiling(128, rows=128, spans=1, split=1, warps=8, stages=3)
    rows = 128 if padded_rows == 32 else 64
    is_low = triton.cdiv(outputs, rows) <= _FEW_TILES
    if padded_rows > (128 if is_low else 64):
        return Tiling(64, rows, spans=1, split=1, warps=4, stages=4)
    if is_low:
        most_split = 4 if padded_rows <= 32 else 2
    else:
        most_split = 2 if padded_rows == 16 else 1
    at_once = 1 if spans % 2 else 2
    split = next(split for split in (4, 2, 1) if split <= most_split and spans % (at_once * split) == 0)
    return Tiling(padded_rows, rows, at_once, split, warps=4, stages=3)


@triton.jit
def _matmul_int4(
    x,
    weight,
    pairs,
    out,
    bias,
    add,
    shares,
    counters,
    num_rows,
    O: tl.constexpr,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRED: tl.constexpr,
    SPAN: tl.constexpr,
    PLANE: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    SPLIT: tl.constexpr,
    MANY: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    ALL: tl.constexpr = (I + SPAN - 1) // SPAN
    SHARE: tl.constexpr = ALL // SPLIT
    PAIRS: tl.constexpr = SPAN // (2 * GROUP if PAIRED else GROUP)
    tile, block = skinny.placed(num_rows, O, M, ROWS, 1, MANY)
    output = skinny.outputs_of(tile, O, ROWS)
    row, inside = skinny.rows_of(block, num_rows, M, 1, MANY)
    place = tl.arange(0, PLANE)
    weights = weight + output.to(tl.int64)[:, None] * (ALL * PLANE) + place[None, :]
    values = x + row[None, :] * I + place[:, None]
    first = tl.program_id(1) * SHARE
    if OVERLAP:
        prefetch(weight + output.to(tl.int64) * (ALL * PLANE) + first * PLANE, AHEAD)
    wait(OVERLAP)
    total = tl.zeros((ROWS, M), tl.float32)
    for start in tl.range(0, SHARE, SPANS):
        for step in tl.static_range(SPANS):
            span = first + start + step
            words = tl.load(weights + span * PLANE)
            for at in tl.static_range(SPAN // PLANE):
                if at * PLANE % (2 * GROUP if PAIRED else GROUP) == 0:
                    # The words of a span follow one another. Nothing narrower than a word is copied ahead of its use.
                    pair = tl.load(pairs + (span * PAIRS + at * PLANE * PAIRS // SPAN) * O + output)
                    pair = tl.broadcast_to(pair[:, None], (ROWS, PLANE))
                column = span * SPAN + at * PLANE
                there = inside[None, :] if I % SPAN == 0 else inside[None, :] & (column + place < I)[:, None]
                few = tl.load(values + column, mask=there, other=0.0)
                # In the call: what is given a name is no constant any more.
                wide = plane(words, pair, at, at * PLANE // GROUP % 2 if PAIRED else 0, PAIRED, x.dtype.element_ty)
                total = tl.dot(wide, few, total)
    skinny.finish(
        total, tile, block, out, bias, add, shares, counters, None, None, num_rows,
        O, M, ROWS, SPLIT, 1, MANY, BIAS, ADD,
    )  # fmt: skip
