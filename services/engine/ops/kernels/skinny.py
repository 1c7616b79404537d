"""A few rows times a weight matrix: bound by reading the matrix once.

The product is computed transposed, out^T = W x^T: the matrix is the operand of 64 rows and more that Hopper's matrix units
want, and the rows of x, filled up to 16 or 32, are the narrow one. Where the matrix has few rows, several programs share
them, each with a part of the columns ("split-K"); the last of them to be done adds up the parts, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait

MOST_ROWS = 32
"""Of x: with more, cuBLAS is as fast."""


_ROWS, _COLUMNS = 64, 128
"""Of the matrix, a tile: what a program takes at a time (measured on an H200, as what follows)."""

_SPLITS = ((64, 1), (32, 2), (0, 4))
"""With more tiles of rows than that, so many programs for each."""


def split_of(weight_OI: Tensor) -> int | None:
    """How many programs share a tile of this matrix's rows; None where it does not fall into whole tiles."""
    outputs, inputs = weight_OI.shape
    if weight_OI.dtype.itemsize != 2 or outputs % _ROWS:
        return None
    split = programs_for(outputs)
    return None if inputs % (_COLUMNS * split) else split


def programs_for(outputs: int) -> int:
    """How many programs may share a tile of a matrix's rows."""
    return next(split for most, split in _SPLITS if outputs // _ROWS > most)


def counters_of(weight_OI: Tensor) -> Tensor:
    """What `matmul` counts in, one number for each tile of the matrix. Zero between two calls; of this matrix alone."""
    return torch.zeros(triton.cdiv(weight_OI.shape[0], _ROWS), dtype=torch.int32, device=weight_OI.device)


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
    rows: int = _ROWS,
    columns: int = _COLUMNS,
    warps: int = 4,
    stages: int = 6,
) -> Tensor:
    """x @ weight.T + bias + add, [M, O], in the dtype of x or another one. `split` and `counters`: those of the
    matrix; where nothing is split, no counters are needed. `scales`: of the rows of x and of the matrix, which the product
    is multiplied with. `rows` (64 at least) and `columns`: of the matrix, a tile, into which it must fall."""
    assert split == 1 or counters is not None
    (num_rows, inputs), outputs = x_MI.shape, weight_OI.shape[0]
    out = torch.empty((num_rows, outputs), dtype=dtype or x_MI.dtype, device=x_MI.device)
    padded = max(16, triton.next_power_of_2(num_rows))
    parts = torch.empty((split, padded, outputs) if split > 1 else 0, dtype=torch.float32, device=x_MI.device)
    _matmul[(outputs // rows, split)](
        x_MI,
        weight_OI,
        out,
        x_MI if bias_O is None else bias_O,
        x_MI if add is None else add,
        parts,
        parts if counters is None else counters,
        *scales,
        num_rows,
        O=outputs,
        I=inputs,
        M=padded,
        ROWS=rows,
        COLUMNS=columns,
        SPLIT=split,
        BIAS=bias_O is not None,
        ADD=add is not None,
        num_warps=warps,
        num_stages=stages,
        **overlapped(x_MI),
    )
    return out


@triton.jit
def _matmul(
    x,
    weight,
    out,
    bias,
    add,
    parts,
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
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    SHARE: tl.constexpr = I // SPLIT
    tile, part = tl.program_id(0), tl.program_id(1)
    output = tile * ROWS + tl.arange(0, ROWS)
    row = tl.arange(0, M)
    inside = row < num_rows
    column = part * SHARE + tl.arange(0, COLUMNS)
    weights = weight + output.to(tl.int64)[:, None] * I + column[None, :]
    values = x + row[None, :] * I + column[:, None]
    wait(OVERLAP)
    total = tl.zeros((ROWS, M), tl.float32)
    for start in tl.range(0, SHARE, COLUMNS):
        w = tl.load(weights + start)
        v = tl.load(values + start, mask=inside[None, :], other=0.0)
        total = tl.dot(w, v, total)
    at = row[None, :] * O + output[:, None]
    if SPLIT > 1:
        tl.store(parts + part * M * O + at, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") < SPLIT - 1:
            return
        tl.store(counters + tile, 0)
        total = tl.zeros((ROWS, M), tl.float32)
        for other in tl.static_range(SPLIT):
            total += tl.load(parts + other * M * O + at)
    if scales_x is not None:
        total *= tl.load(scales_x + row, mask=inside, other=0.0)[None, :]
        total *= tl.load(scales_weight + output)[:, None]
    if BIAS:
        total += tl.load(bias + output).to(tl.float32)[:, None]
    if ADD:
        total += tl.load(add + at, mask=inside[None, :], other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=inside[None, :])
