"""A few rows times a weight matrix: bound by reading the matrix once.

The product is computed transposed, out^T = W x^T: the matrix is the operand of 64 rows and more that Hopper's matrix units
want, and the rows of x, filled up to 16 or 32, are the narrow one. Where the matrix has few rows, several programs share
them, each with a part of the columns ("split-K"); the last of them to be done adds up the parts, in their order.

More rows than a program takes are cut into blocks. Blocks take turns, so that a tile of the matrix and a block of rows are read from
memory once for several programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import FINER
from services.engine.ops.kernels.overlap import bytes_ahead, overlapped, prefetch, wait

MOST_ROWS = 32
"""Of x: with more, cuBLAS is as fast."""


_ROWS, _COLUMNS = 64, 128
"""Of the matrix, a tile: what a program takes at a time (measured on an H200, as what follows)."""

_SPLITS = ((64, 1), (32, 2), (0, 4))
"""With more tiles of rows than that, so many programs for each."""

BLOCK = (64, 128)
"""So many outputs and inputs share a scale where a matrix in eight bits has a scale for each block."""

_TURNS = tl.constexpr(8)
"""So many blocks of rows are multiplied with a tile before the next tile's turn (not measured yet)."""


def split_of(weight_OI: Tensor) -> int | None:
    """How many programs share a tile of this matrix's rows; None where it does not fall into whole tiles."""
    outputs, inputs = weight_OI.shape
    if weight_OI.dtype.itemsize != 2 or outputs % _ROWS:
        return None
    split = programs_for(outputs)
    return None if inputs % (_COLUMNS * split) else split


def programs_for(outputs: int) -> int:
    """How many programs may share a tile of a matrix's rows."""
    return next(split for most, split in _SPLITS if triton.cdiv(outputs, _ROWS) > most)


def counters_of(weight_OI: Tensor) -> Tensor:
    """What `matmul` counts in, one number for each tile of the matrix. Zero between two calls; of this matrix alone."""
    return torch.zeros(triton.cdiv(weight_OI.shape[0], _ROWS), dtype=torch.int32, device=weight_OI.device)


def padded(num_rows: int) -> int:
    """How many rows a program of so many takes."""
    return max(16, triton.next_power_of_2(num_rows))


def matmul(
    x_MI: Tensor,
    weight_OI: Tensor,
    split: int,
    *,
    counters: Tensor | None = None,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    parts: int = 1,
    block: int | None = None,
    rows: int = _ROWS,
    columns: int = _COLUMNS,
    warps: int = 4,
    stages: int = 6,
) -> Tensor:
    """x @ weight.T + bias + add, [M, O], in the dtype of x or another one. `split` and `counters`: those of the
    matrix; where nothing is split, no counters are needed. `scales`: of the rows of x and of the matrix, which the product
    is multiplied with. `parts`: those in which rows of x come, as in `Quantized`. `block`: so many of them a program, with their parts;
    by default all. Or scales of blocks of the matrix, [G, O / 64], and of
    as many inputs of x, [G, M]. `rows` (64 at least) and `columns`: of the matrix, a tile; whole ones are faster."""
    (num_rows, inputs), outputs = x_MI.shape, weight_OI.shape[0]
    block, num_rows = block or padded(num_rows), num_rows // parts
    num_blocks = triton.cdiv(num_rows * parts, block)
    assert split == 1 or (counters is not None and num_blocks == 1)
    by_blocks = scales[1] is not None and scales[1].dim() == 2
    assert not by_blocks or (rows, columns) == BLOCK
    out = torch.empty((num_rows, outputs), dtype=dtype or x_MI.dtype, device=x_MI.device)
    shares = torch.empty((split, block // parts, outputs) if split > 1 else 0, dtype=torch.float32, device=x_MI.device)
    _matmul_few_rows[(triton.cdiv(outputs, rows) * num_blocks, split)](
        x_MI,
        weight_OI,
        out,
        x_MI if bias_O is None else bias_O,
        x_MI if add is None else add,
        shares,
        shares if counters is None else counters,
        *scales,
        num_rows,
        O=outputs,
        I=inputs,
        M=block,
        ROWS=rows,
        COLUMNS=columns,
        SPLIT=split,
        PARTS=parts,
        BLOCKS=by_blocks,
        MANY=num_blocks > 1,
        BIAS=bias_O is not None,
        ADD=add is not None,
        AHEAD=bytes_ahead(inputs // split * weight_OI.itemsize),
        num_warps=warps,
        num_stages=stages,
        **overlapped(x_MI),
    )
    return out


@triton.jit
def _matmul_few_rows(
    x,
    weight,
    out,
    bias,
    add,
    shares,
    counters,
    scales_x,
    scales_weight,
    num_rows,
    O: tl.constexpr,
    I: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MANY: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    SHARE: tl.constexpr = (I + COLUMNS * SPLIT - 1) // (COLUMNS * SPLIT) * COLUMNS
    SUMS: tl.constexpr = tl.int32 if weight.dtype.element_ty == tl.int8 else tl.float32
    tile, block = placed(num_rows, O, M, ROWS, PARTS, MANY)
    output = outputs_of(tile, O, ROWS)
    row, inside = rows_of(block, num_rows, M, PARTS, MANY)
    column = tl.program_id(1) * SHARE + tl.arange(0, COLUMNS)
    weights = weight + output.to(tl.int64)[:, None] * I + column[None, :]
    values = x + row[None, :] * I + column[:, None]
    if OVERLAP:
        prefetch(weight + output.to(tl.int64) * I + tl.program_id(1) * SHARE, AHEAD)
    wait(OVERLAP)
    total = tl.zeros((ROWS, M), SUMS)
    for start in tl.range(0, SHARE, COLUMNS):
        if SHARE * SPLIT == I:
            w = tl.load(weights + start)
            v = tl.load(values + start, mask=inside[None, :], other=0.0)
        else:
            there = start + column < I
            w = tl.load(weights + start, mask=there[None, :], other=0.0)
            v = tl.load(values + start, mask=inside[None, :] & there[:, None], other=0.0)
        if BLOCKS:
            group = tl.program_id(1) * (SHARE // COLUMNS) + start // COLUMNS
            scale = tl.load(scales_x + group * num_rows + row, mask=inside, other=0.0)
            scale *= tl.load(scales_weight + group * ((O + ROWS - 1) // ROWS) + tile)
            total += tl.dot(w, v, out_dtype=SUMS) * scale[None, :]
        else:
            total = tl.dot(w, v, total, out_dtype=SUMS)
    finish(
        total.to(tl.float32), tile, block, out, bias, add, shares, counters,
        None if BLOCKS else scales_x, None if BLOCKS else scales_weight, num_rows,
        O, M, ROWS, SPLIT, PARTS, MANY, BIAS, ADD,
    )  # fmt: skip


@triton.jit
def placed(num_rows, O: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr):
    """The tile of the matrix and the block of rows that a program takes."""
    tile, block = tl.program_id(0), 0
    if MANY:
        in_turn: tl.constexpr = _TURNS * ((O + ROWS - 1) // ROWS)
        first = tile // in_turn * _TURNS
        turns = tl.minimum(tl.cdiv(num_rows, M // PARTS) - first, _TURNS)
        tile, block = tile % in_turn // turns, first + tile % in_turn % turns
    return tile, block


@triton.jit
def outputs_of(tile, O: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile. Those behind the matrix's last are computed from that one, and not stored."""
    output = tile * ROWS + tl.arange(0, ROWS)
    return output if O % ROWS == 0 else tl.minimum(output, O - 1)


@triton.jit
def rows_of(block, num_rows, M: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr):
    """Where the rows of a block lie in x, those of the second part behind all of the first, and which of them there are."""
    slot = tl.arange(0, M)
    row = slot if PARTS == 1 else slot % (M // PARTS)
    if MANY:
        row = row + block.to(tl.int64) * (M // PARTS)
    inside = row < num_rows
    if PARTS > 1:
        row = row + slot // (M // PARTS) * num_rows
    return row, inside


@triton.jit
def finish(
    total, tile, block, out, bias, add, shares, counters, scales_x, scales_weight, num_rows,
    O: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Stores the products of a tile and a block of rows, [ROWS, M] in float32: the parts of a row added up, and then the shares of
    programs, by the last of them to be done."""
    EACH: tl.constexpr = M // PARTS
    if PARTS == 2:
        finer = tl.where(tl.arange(0, M) < EACH, 1.0, 1.0 / _FINER)
        total = tl.sum(tl.reshape(total * finer[None, :], (ROWS, PARTS, EACH)), 1)
    output, row = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, EACH)
    if MANY:
        row = row + block.to(tl.int64) * EACH
    held = (row < num_rows)[None, :]
    if O % ROWS:
        held = held & (output < O)[:, None]
    at = row[None, :] * O + output[:, None]
    if SPLIT == 1:
        _store(total, at, held, row, output, out, bias, add, scales_x, scales_weight, num_rows, O, BIAS, ADD)
    else:
        tl.store(shares + tl.program_id(1) * EACH * O + at, total, mask=held)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(counters + tile, 0)
            total = tl.zeros((ROWS, EACH), tl.float32)
            for other in tl.static_range(SPLIT):
                total += tl.load(shares + other * EACH * O + at, mask=held, other=0.0)
            _store(total, at, held, row, output, out, bias, add, scales_x, scales_weight, num_rows, O, BIAS, ADD)


@triton.jit
def _store(
    total, at, held, row, output, out, bias, add, scales_x, scales_weight, num_rows,
    O: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The products with scales, bias and what is added."""
    there = output < O
    if scales_x is not None:
        total *= tl.load(scales_x + row, mask=row < num_rows, other=0.0)[None, :]
    if scales_weight is not None:
        total *= tl.load(scales_weight + output, mask=there, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[:, None]
    if ADD:
        total += tl.load(add + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=held)


_FINER = tl.constexpr(FINER)
