"""The gate of a gated MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.kernels import quantize
from services.engine.ops.kernels.overlap import overlapped, wait

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `ops.activation.silu_mul`, of a dense [N, 2 * O]."""
    num_rows, width = gate_up.shape
    size = width // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(triton.cdiv(size, _BLOCK), num_rows)](
        gate_up, out, SIZE=size, BLOCK=_BLOCK, num_warps=4, **overlapped(out)
    )
    return out


def silu_mul_quantized(gate_up: Tensor, form: RowScaled) -> Quantized:
    """As `ops.activation.silu_mul` in this form, of a dense [N, 2 * O]."""
    num_rows, width = gate_up.shape
    size = width // 2
    block = triton.next_power_of_2(size)
    if block > quantize.MOST_COLUMNS:
        return quantize.quantize(silu_mul(gate_up), form)
    out = quantize.empty(num_rows, size, form, device=gate_up.device)
    _silu_mul_quantized[(num_rows,)](
        gate_up,
        *out,
        *quantize.rounding(form, block),
        SIZE=size,
        WIDTH=block,
        num_warps=quantize.warps_for(block),
        **overlapped(gate_up),
    )
    return out


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    wait(OVERLAP)
    gate, up = _halves(gate_up + row * 2 * SIZE, column, inside, SIZE)
    tl.store(out + row * SIZE + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _silu_mul_quantized(
    gate_up, out, scales, largest, by, PARTS: tl.constexpr, SHARE: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    wait(OVERLAP)
    gate, up = _halves(gate_up + row * 2 * SIZE, column, column < SIZE, SIZE)
    rounded = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)
    quantize.store_quantized(rounded, row, out, scales, largest, by, PARTS, SHARE, SIZE, WIDTH)


@triton.jit
def _halves(row, column, inside, SIZE: tl.constexpr):
    gate = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    return gate, up
