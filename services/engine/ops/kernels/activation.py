"""The gate of a gated MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    wait(OVERLAP)
    gate = tl.load(gate_up + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, gate * tl.sigmoid(gate) * up, mask=inside)
