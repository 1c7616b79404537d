"""Root mean square norm, a row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `ops.norm.rms_norm`. The last dimension of x is dense."""
    size = weight.shape[0]
    rows = x.reshape(-1, size)
    out = torch.empty_like(rows)
    width = triton.next_power_of_2(size)
    _rms_norm[(rows.shape[0],)](
        rows, weight, out, rows.stride(0), eps, SIZE=size, WIDTH=width, num_warps=_warps(width), **overlapped(x)
    )
    return out.view(x.shape)


def _warps(width: int) -> int:
    """Eight values a thread, up to a block of 16 warps."""
    return min(16, max(1, width // 256))


@triton.jit
def _rms_norm(x, weight, out, row_stride, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    w = tl.load(weight + column, mask=inside, other=0.0)
    wait(OVERLAP)
    values = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    tl.store(out + row * SIZE + column, values * scale * w.to(tl.float32), mask=inside)
