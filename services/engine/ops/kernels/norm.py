"""Root mean square norm, a row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.kernels import quantize
from services.engine.ops.kernels.overlap import overlapped, wait


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, add: Tensor | None = None) -> Tensor:
    """As `ops.norm.rms_norm`, of the sum with `add`, in its place, where there is one. The last dimension of x is dense, all of `add`."""
    rows = x.reshape(-1, weight.shape[0])
    out = torch.empty_like(rows)
    _launch(rows, add, weight, out, eps)
    return out.view(x.shape)


def rms_norm_quantized(
    x_NI: Tensor, weight: Tensor, eps: float, form: RowScaled, *, add_NI: Tensor | None = None
) -> Quantized:
    """As `rms_norm`, in this form."""
    out = quantize.empty(x_NI.shape[0], x_NI.shape[1], form, device=x_NI.device)
    _launch(x_NI, add_NI, weight, out.values_NI, eps, out.scales_N, form)
    return out


def _launch(
    rows: Tensor,
    add: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    scales: Tensor | None = None,
    form: RowScaled | None = None,
) -> None:
    size = weight.shape[0]
    width = triton.next_power_of_2(size)
    _rms_norm[(rows.shape[0],)](
        rows,
        add,
        weight,
        out,
        rows.stride(0),
        eps,
        scales,
        *((None, None, 1, 0) if form is None else quantize.rounding(form, width)),
        SIZE=size,
        WIDTH=width,
        num_warps=_warps(width),
        **overlapped(rows),
    )


def _warps(width: int) -> int:
    """Eight values a thread, up to a block of 16 warps."""
    return min(16, max(1, width // 256))


@triton.jit
def _rms_norm(
    x,
    add,
    weight,
    out,
    row_stride,
    eps,
    scales,
    largest,
    by,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    w = tl.load(weight + column, mask=inside, other=0.0)
    wait(OVERLAP)
    values = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        terms = add + row * SIZE + column
        total = (values + tl.load(terms, mask=inside, other=0.0).to(tl.float32)).to(add.dtype.element_ty)
        tl.store(terms, total, mask=inside)
        values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    if scales is None:
        tl.store(out + row * SIZE + column, values * scale * w.to(tl.float32), mask=inside)
    else:
        rounded = (values * scale * w.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
        quantize.store_quantized(rounded, row, out, scales, largest, by, PARTS, SHARE, SIZE, WIDTH)
