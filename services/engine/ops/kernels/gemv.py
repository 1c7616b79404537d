"""One row times a weight matrix: bound by reading the matrix, and by how many of its bytes are on their way at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait


def is_supported(weight_OI: Tensor) -> bool:
    """Whether the matrix falls into whole tiles."""
    outputs, inputs = weight_OI.shape
    rows, columns, _ = _tile(outputs, inputs)
    return weight_OI.dtype.itemsize == 2 and outputs % rows == 0 and inputs % columns == 0


def _tile(outputs: int, inputs: int) -> tuple[int, int, int]:
    """Rows and columns of the matrix a program takes at a time, and its warps (measured on an H200)."""
    if inputs <= 1024:
        return 2, 1024, 4
    if outputs <= 2048:
        return 2, 1024, 2
    return 16, 256, 4


def gemv(
    x_1I: Tensor,
    weight_OI: Tensor,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias + add, [1, O], in the dtype of x or another one."""
    outputs, inputs = weight_OI.shape
    rows, columns, warps = _tile(outputs, inputs)
    out = torch.empty((1, outputs), dtype=dtype or x_1I.dtype, device=x_1I.device)
    _gemv[(outputs // rows,)](
        x_1I,
        weight_OI,
        out,
        x_1I if bias_O is None else bias_O,
        x_1I if add is None else add,
        I=inputs,
        ROWS=rows,
        COLUMNS=columns,
        BIAS=bias_O is not None,
        ADD=add is not None,
        num_warps=warps,
        **overlapped(x_1I),
    )
    return out


@triton.jit
def _gemv(
    x,
    weight,
    out,
    bias,
    add,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = weight + row.to(tl.int64)[:, None] * I + column[None, :]
    first = tl.load(at)  # on its way while the kernel before ends
    wait(OVERLAP)
    total = first.to(tl.float32) * tl.load(x + column).to(tl.float32)[None, :]
    for start in tl.range(COLUMNS, I, COLUMNS, num_stages=4):
        values = tl.load(x + start + column).to(tl.float32)
        total += tl.load(at + start).to(tl.float32) * values[None, :]
    found = tl.sum(total, 1)
    if BIAS:
        found += tl.load(bias + row).to(tl.float32)
    if ADD:
        found += tl.load(add + row).to(tl.float32)
    tl.store(out + row, found)
