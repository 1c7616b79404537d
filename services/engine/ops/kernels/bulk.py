"""Many rows in eight bits times a matrix in eight bits, with a scale for each row and each output: bound by the matrix units.

Both operands are copied by descriptors ("TMA"), which fill up with zeros what lies outside and leave out of the result what does; no
thread computes an address. A descriptor is a parameter of the launch, so a captured step needs no memory for it. Tiles of the
result follow each other in groups of rows, so that those computed at a time share what they read in the L2 cache.

Shapes: N rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.ops.kernels.overlap import overlapped, wait

_ALIGNED = 16
"""Bytes: where rows that a descriptor stands for must begin."""
STORED = 128
"""Bytes of each row of a tile's result that are scaled and stored at a time: so registers and shared memory suffice beside the operands
of the next tile."""


class Cut(Protocol):
    """A way to cut a product."""

    def tiles(self, num_rows: int, outputs: int) -> int:
        """Into how many tiles it falls."""
        ...


T = TypeVar("T", bound=Cut)


class Tiling(NamedTuple):
    """How a product is cut: the rows of x and of the matrix that a tile takes, so many inputs at a time; how many tiles of rows follow
    each other for the same outputs; and whether a program goes from tile to tile, its loads of one before it stores the last."""

    rows: int
    columns: int
    depth: int
    group: int
    persistent: bool
    warps: int
    stages: int

    def tiles(self, num_rows: int, outputs: int) -> int:
        return triton.cdiv(num_rows, self.rows) * triton.cdiv(outputs, self.columns)


TILINGS = (
    Tiling(rows=128, columns=256, depth=128, group=16, persistent=True, warps=8, stages=4),
    Tiling(rows=128, columns=128, depth=128, group=16, persistent=False, warps=8, stages=3),
)
"""Large tiles first; of the last, two share a multiprocessor (not measured yet)."""


def takes(x_NI: Tensor, weight_OI: Tensor, add: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether rows of the operands, of the result and of what is added begin where descriptors want them."""
    widths = [weight_OI.shape[1] * weight_OI.itemsize, weight_OI.shape[0] * dtype.itemsize]
    if add is not None:
        widths.append(weight_OI.shape[0] * add.itemsize)
    starts = [each.data_ptr() for each in (x_NI, weight_OI, add) if each is not None]
    return not any(each % _ALIGNED for each in widths + starts)


def fitting(tilings: Sequence[T], num_rows: int, outputs: int, programs: int) -> T:
    """For so many rows of x, on so many multiprocessors: the first of which each has a tile, or else the last."""
    return next((each for each in tilings if each.tiles(num_rows, outputs) >= programs), tilings[-1])


def matmul(
    x_NI: Tensor,
    weight_OI: Tensor,
    scales_N: Tensor,
    scales_O: Tensor,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype,
    cut: Tiling | None = None,
) -> Tensor:
    """(x @ weight.T) * scales of rows * scales of outputs + bias + add, [N, O], of tensors that it `takes`: sums of whole numbers are exact,
    what follows is rounded as `skinny.matmul` does it, bit for bit."""
    (num_rows, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    programs = multiprocessors(x_NI.device)
    cut = cut or fitting(TILINGS, num_rows, outputs, programs)
    out = torch.empty((num_rows, outputs), dtype=dtype, device=x_NI.device)
    num_tiles = cut.tiles(num_rows, outputs)
    tile, stored = TensorDescriptor.from_tensor, [cut.rows, min(cut.columns, STORED // dtype.itemsize)]
    _matmul_bulk[(min(num_tiles, programs) if cut.persistent else num_tiles,)](
        tile(x_NI, [cut.rows, cut.depth]),
        tile(weight_OI, [cut.columns, cut.depth]),
        tile(out, stored),
        scales_N,
        scales_O,
        scales_O if bias_O is None else bias_O,
        None if add is None else tile(add, stored),
        num_rows,
        O=outputs,
        I=inputs,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        DEPTH=cut.depth,
        STORED=stored[1],
        GROUP=cut.group,
        PERSISTENT=cut.persistent,
        BIAS=bias_O is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **overlapped(x_NI),
    )
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CPU, which interprets, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def _matmul_bulk(
    x,
    weight,
    out,
    scales_x,
    scales_weight,
    bias,
    add,
    num_rows,
    O: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    if PERSISTENT:
        num_tiles = tl.cdiv(num_rows, ROWS) * ((O + COLUMNS - 1) // COLUMNS)
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            row, column = placed(tile, num_rows, O, ROWS, COLUMNS, GROUP)
            total = _sums(x, weight, row, column, I, ROWS, COLUMNS, DEPTH)
            _finish(
                total, out, scales_x, scales_weight, bias, add, row, column, num_rows, O, ROWS, COLUMNS, STORED, BIAS
            )
    else:
        row, column = placed(tl.program_id(0), num_rows, O, ROWS, COLUMNS, GROUP)
        total = _sums(x, weight, row, column, I, ROWS, COLUMNS, DEPTH)
        _finish(total, out, scales_x, scales_weight, bias, add, row, column, num_rows, O, ROWS, COLUMNS, STORED, BIAS)


@triton.jit
def placed(tile, num_rows, O: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the first output of a tile."""
    in_group: tl.constexpr = GROUP * ((O + COLUMNS - 1) // COLUMNS)
    first = tile // in_group * GROUP
    size = tl.minimum(tl.cdiv(num_rows, ROWS) - first, GROUP)
    return (first + tile % in_group % size) * ROWS, tile % in_group // size * COLUMNS


@triton.jit
def _sums(x, weight, row, column, I: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    SUMS: tl.constexpr = tl.int32 if weight.dtype == tl.int8 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), SUMS)
    for start in tl.range(0, I, DEPTH):
        v = x.load([row, start])
        w = weight.load([column, start])
        total = tl.dot(v, w.T, total, out_dtype=SUMS)
    return total


@triton.jit
def _finish(
    total, out, scales_x, scales_weight, bias, add, row, column, num_rows,
    O: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Stores a tile, halved until so many columns are left."""
    if COLUMNS > STORED:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
        _finish(left, out, scales_x, scales_weight, bias, add, row, column, num_rows, O, ROWS, HALF, STORED, BIAS)
        column += HALF
        _finish(right, out, scales_x, scales_weight, bias, add, row, column, num_rows, O, ROWS, HALF, STORED, BIAS)
    else:
        _store(total, out, scales_x, scales_weight, bias, add, row, column, num_rows, O, ROWS, COLUMNS, BIAS)


@triton.jit
def _store(
    total, out, scales_x, scales_weight, bias, add, row, column, num_rows,
    O: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The sums with scales, bias and what is added, as `skinny` does it."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    there = columns < O
    total = total.to(tl.float32)
    total *= tl.load(scales_x + rows, mask=rows < num_rows, other=0.0)[:, None]
    total *= tl.load(scales_weight + columns, mask=there, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    if add is not None:
        total += add.load([row, column]).to(tl.float32)
    out.store([row, column], total.to(out.dtype))
