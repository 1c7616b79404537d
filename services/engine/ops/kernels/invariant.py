"""Any number of rows times a weight matrix, each row to the same bits whatever rows stand beside it.

One tile, one order of summation: neither follows from the number of rows, as they do in `skinny`, `gemv` and cuBLAS. As in
`skinny` the product is computed transposed, the matrix being the wide operand of the matrix units.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait


def matmul(
    x_NI: Tensor,
    weight_OI: Tensor,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias + add, [N, O], in the dtype of x or another one; summed in float32, in columns from left to right,
    and rounded once."""
    assert x_NI.is_contiguous() and weight_OI.is_contiguous()
    (num_rows, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    out_NO = torch.empty((num_rows, outputs), dtype=dtype or x_NI.dtype, device=x_NI.device)
    if not num_rows:
        return out_NO
    is_wide = x_NI.dtype.itemsize > 2
    tile = 32 if is_wide else 64
    _matmul_invariant[(triton.cdiv(outputs, tile), triton.cdiv(num_rows, tile))](
        x_NI,
        weight_OI,
        out_NO,
        x_NI if bias_O is None else bias_O,
        x_NI if add is None else add,
        num_rows,
        O=outputs,
        I=inputs,
        TILE=tile,
        COLUMNS=tile,
        BIAS=bias_O is not None,
        ADD=add is not None,
        EVEN=inputs % tile == 0,
        PRECISION="ieee" if is_wide else "tf32",
        num_warps=4,
        num_stages=2 if is_wide else 4,
        **overlapped(x_NI),
    )
    return out_NO


@triton.jit
def _matmul_invariant(
    x,
    weight,
    out,
    bias,
    add,
    num_rows,
    O: tl.constexpr,
    I: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    inside = row < num_rows
    # Rows behind the matrix's last are computed from that one, and not stored.
    weights = weight + tl.minimum(output, O - 1).to(tl.int64)[:, None] * I + column[None, :]
    values = x + row.to(tl.int64)[None, :] * I + column[:, None]
    wait(OVERLAP)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in tl.range(0, I, COLUMNS):
        if EVEN:
            w = tl.load(weights + start)
            v = tl.load(values + start, mask=inside[None, :], other=0.0)
        else:
            there = start + column < I
            w = tl.load(weights + start, mask=there[None, :], other=0.0)
            v = tl.load(values + start, mask=inside[None, :] & there[:, None], other=0.0)
        total = tl.dot(w, v, total, input_precision=PRECISION)
    held = inside[None, :] & (output < O)[:, None]
    at = row.to(tl.int64)[None, :] * O + output[:, None]
    if BIAS:
        total += tl.load(bias + output, mask=output < O, other=0.0).to(tl.float32)[:, None]
    if ADD:
        total += tl.load(add + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=held)
