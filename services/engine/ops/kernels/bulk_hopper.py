"""What `bulk` computes, on Hopper alone: a warp loads, two groups of four multiply, and nobody waits for the others but at a stage.

Triton 3.6 waits for each product of whole numbers before it begins the next, and specializes no warps there; Gluon leaves
both to the program. One warp keeps the stages full, across tiles. Either both groups multiply halves of a tile's rows with the same
part of the matrix, or each has tiles of its own, by turns: one scales and stores while the other multiplies.

A stage has two barriers: `ready`, when its bytes are there, and `empty`, when every group that reads it is done. A group's first
round of waiting for `empty` is none. Groups with tiles of their own also wait for their `turn`: a barrier tells only odd rounds from
even ones, so a group must not look at one before the other has seen its last.

Shapes: N rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from services.engine.ops.kernels.bulk import STORED, fitting, multiprocessors, placed
from services.engine.ops.kernels.overlap import overlapped, wait

_DTYPES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}
_REGISTERS = gl.constexpr((240, 24))
"""Of a thread that multiplies and of one that loads; with four warps of each role they are all that there are."""


class Tiling(NamedTuple):
    """How a product is cut: the rows of x that a group of warps takes, and of the matrix, so many inputs at a time; how many tiles of rows
    follow each other for the same outputs; and whether both groups share a tile, of twice the rows, or each has its own."""

    rows: int
    columns: int
    depth: int
    group: int
    shared: bool
    stages: int

    def tiles(self, num_rows: int, outputs: int) -> int:
        height = self.rows * (2 if self.shared else 1)
        return triton.cdiv(num_rows, height) * triton.cdiv(outputs, self.columns)


TILINGS = (
    Tiling(rows=64, columns=256, depth=128, group=16, shared=True, stages=4),
    Tiling(rows=128, columns=128, depth=128, group=16, shared=False, stages=6),
    Tiling(rows=64, columns=128, depth=128, group=16, shared=True, stages=6),
)
"""Large tiles first. (The first was found best of seven on an H200 with 8,192 rows, the others are not measured yet.)"""


@cache
def is_able(device: torch.device) -> bool:
    """Hopper's matrix units are neither older nor newer GPUs'."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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
    """As `bulk.matmul`, bit for bit where sums are exact."""
    (num_rows, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    programs = multiprocessors(x_NI.device)
    cut = cut or fitting(TILINGS, num_rows, outputs, programs)
    out = torch.empty((num_rows, outputs), dtype=dtype, device=x_NI.device)
    stored = STORED // dtype.itemsize
    _matmul_bulk_hopper[(min(programs, cut.tiles(num_rows, outputs)),)](
        _described(x_NI, [cut.rows, cut.depth]),
        _described(weight_OI, [cut.columns, cut.depth]),
        _described(out, [cut.rows, stored]),
        scales_N,
        scales_O,
        bias_O,
        add,
        num_rows,
        O=outputs,
        I=inputs,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        DEPTH=cut.depth,
        STORED=stored,
        GROUP=cut.group,
        SHARES=2 if cut.shared else 1,
        STAGES=cut.stages,
        num_warps=4,
        **overlapped(x_NI),
    )
    return out


def _described(tensor: Tensor, tile: Sequence[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), _DTYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, list(tile), layout)


@gluon.jit
def _matmul_bulk_hopper(
    x,
    weight,
    out,
    scales_x,
    scales_weight,
    bias,
    add,
    num_rows,
    O: gl.constexpr,
    I: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    STORED: gl.constexpr,
    GROUP: gl.constexpr,
    SHARES: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    values = gl.allocate_shared_memory(x.dtype, [STAGES * SHARES, ROWS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, COLUMNS, DEPTH], weight.layout)
    results = gl.allocate_shared_memory(out.dtype, [2, ROWS, STORED], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=SHARES)
    for who in gl.static_range(2):
        mbarrier.init(turn.index(who), count=1)
    wait(OVERLAP)
    held = (values, weights, results, ready, empty, turn)
    given = (scales_x, scales_weight, bias, add, num_rows)
    gl.warp_specialize(
        [
            (_multiply, (held, out, given, 0, O, I, ROWS, COLUMNS, DEPTH, STORED, GROUP, SHARES, STAGES)),
            (_multiply, (held, out, given, 1, O, I, ROWS, COLUMNS, DEPTH, STORED, GROUP, SHARES, STAGES)),
            (_load, (held, x, weight, num_rows, O, I, ROWS, COLUMNS, DEPTH, GROUP, SHARES, STAGES)),
        ],
        [4, 1],
        _REGISTERS,
    )


@gluon.jit
def _load(
    held, x, weight, num_rows,
    O: gl.constexpr, I: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
    GROUP: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tile after tile into the stages."""
    values, weights, _, ready, empty, _ = held
    count = 0
    for tile in range(gl.program_id(0), _num_tiles(num_rows, O, ROWS * SHARES, COLUMNS), gl.num_programs(0)):
        row, column = placed(tile, num_rows, O, ROWS * SHARES, COLUMNS, GROUP)
        for start in range(0, I, DEPTH):
            stage = count % STAGES
            full = ready.index(stage)
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full, (ROWS * SHARES + COLUMNS) * DEPTH)
            for share in gl.static_range(SHARES):
                at = stage * SHARES + share
                tma.async_copy_global_to_shared(x, [row + share * ROWS, start], full, values.index(at))
            tma.async_copy_global_to_shared(weight, [column, start], full, weights.index(stage))
            count += 1


@gluon.jit
def _multiply(
    held, out, given, WHO: gl.constexpr,
    O: gl.constexpr, I: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
    STORED: gl.constexpr, GROUP: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group's share of every tile, or all of every other one."""
    values, weights, results, ready, empty, turn = held
    num_rows = given[4]
    WHOLE: gl.constexpr = values.dtype == gl.int8
    layout: gl.constexpr = _layout(COLUMNS, WHOLE)
    STEPS: gl.constexpr = (I + DEPTH - 1) // DEPTH
    # Of the others' tiles, where there are any, nothing is seen.
    SKIPPED: gl.constexpr = STEPS * (2 - SHARES)
    SHARE: gl.constexpr = WHO * (SHARES - 1)
    before: gl.constexpr = WHO * (2 - SHARES)
    first, step = gl.program_id(0) + before * gl.num_programs(0), (3 - SHARES) * gl.num_programs(0)
    count, phase = before * STEPS, 1 - WHO
    for tile in range(first, _num_tiles(num_rows, O, ROWS * SHARES, COLUMNS), step):
        row, column = placed(tile, num_rows, O, ROWS * SHARES, COLUMNS, GROUP)
        if SHARES == 1:
            mbarrier.wait(turn.index(WHO), phase)
            phase ^= 1
        total = gl.zeros((ROWS, COLUMNS), gl.int32 if WHOLE else gl.float32, layout)
        for start in range(0, I, DEPTH):
            stage = count % STAGES
            mbarrier.wait(ready.index(stage), count // STAGES & 1)
            v, w = values.index(stage * SHARES + SHARE), weights.index(stage).permute((1, 0))
            total = warpgroup_mma(v, w, total, use_acc=start > 0, is_async=True)
            # One stays under way; the stage of the one before it is free.
            total = warpgroup_mma_wait(1, [total])
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=start > 0)
            count += 1
        if SHARES == 1:
            mbarrier.arrive(turn.index(1 - WHO))
        total = warpgroup_mma_wait(0, [total])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))
        count += SKIPPED
        _finish(
            total, results.index(WHO), out, given, row + SHARE * ROWS, column, O, ROWS, COLUMNS, STORED, WHOLE
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _num_tiles(num_rows, O: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return (num_rows + ROWS - 1) // ROWS * ((O + COLUMNS - 1) // COLUMNS)


@gluon.constexpr_function
def _layout(columns, whole):
    """Where a group of warps has the sums of so many columns. Of whole numbers Triton has no instruction for 256."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(columns, 128 if whole else 256), 32])


@gluon.jit
def _finish(
    total, result, out, given, row, column,
    O: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STORED: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Stores a tile, halved until so many columns are left."""
    if COLUMNS > STORED:
        HALF: gl.constexpr = COLUMNS // 2
        left, right = total.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()
        _finish(left, result, out, given, row, column, O, ROWS, HALF, STORED, WHOLE)
        _finish(right, result, out, given, row, column + HALF, O, ROWS, HALF, STORED, WHOLE)
    else:
        _store(total, result, out, given, row, column, O, ROWS, COLUMNS, WHOLE)


@gluon.jit
def _store(
    total, result, out, given, row, column,
    O: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """The sums with scales, bias and what is added, as `bulk` does it, by way of `result`."""
    scales_x, scales_weight, bias, add, num_rows = given
    layout: gl.constexpr = _layout(COLUMNS, WHOLE)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    inside, there = rows < num_rows, columns < O
    total = gl.convert_layout(total, layout, assert_trivial=True).to(gl.float32)
    total *= gl.load(scales_x + rows, mask=inside, other=0.0)[:, None]
    total *= gl.load(scales_weight + columns, mask=there, other=0.0)[None, :]
    if bias is not None:
        total += gl.load(bias + columns, mask=there, other=0.0).to(gl.float32)[None, :]
    if add is not None:
        at = rows.to(gl.int64)[:, None] * O + columns[None, :]
        total += gl.load(add + at, mask=inside[:, None] & there[None, :], other=0.0).to(gl.float32)
    tma.store_wait(0)
    result.store(total.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], result)
