"""Activations in eight bits, each row with a scale of its own, or all with one.

Shapes: N rows, I features, G groups of them.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.forms import FINER, Quantized, RowScaled

SMALLEST = 2.0**-100
"""The least that counts as a row's largest value, so that a row of zeros can be divided by it."""


def quantize(x_NI: Tensor, form: RowScaled) -> Quantized:
    """The rows of x in this form: scaled in float32, rounded to the nearest value, ties to even."""
    if x_NI.is_cuda:
        from services.engine.ops.kernels import quantize as kernels

        return kernels.quantize(x_NI, form)
    return by_torch(x_NI, form)


def by_torch(x_NI: Tensor, form: RowScaled) -> Quantized:
    """`quantize` on any device and in any thread, where a kernel of ours wants the thread's device to be that of x."""
    if form.share is not None:
        return _by_groups(x_NI, form, form.share)
    x_NI = x_NI.float()  # once: every operation on numbers of two kinds does it again
    peaks_N1 = x_NI.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST)
    if form.by is None:
        largest = _largest(form.dtype, x_NI.device)
        scales_N1, factors_N1 = peaks_N1 / largest, largest / peaks_N1
    else:
        scales_N1 = form.by + peaks_N1.mul_(0)
        factors_N1 = scales_N1.reciprocal()
    return Quantized(_rounded(x_NI * factors_N1, form), scales_N1.squeeze(1))


def dequantize(x: Quantized, form: RowScaled) -> Tensor:
    """What rows in this form stand for, [N, I] in float32."""
    values_NI = x.values_NI.float()
    if form.share is not None:
        return values_NI * x.scales_N.t().repeat_interleave(form.share, 1)[:, : values_NI.shape[1]]
    if form.parts == 2:
        coarse_NI, fine_NI = values_NI.chunk(2)
        values_NI = coarse_NI + fine_NI / FINER
    return values_NI * x.scales_N[:, None]


def _by_groups(x_NI: Tensor, form: RowScaled, share: int) -> Quantized:
    """Each group as if it were a row."""
    num_rows, size = x_NI.shape
    groups = F.pad(x_NI, (0, -size % share)).view(-1, share)
    values, scales = by_torch(groups, RowScaled(form.dtype))
    values_NI = values.view(num_rows, -1)[:, :size].contiguous()
    return Quantized(values_NI, scales.view(num_rows, -1).t().contiguous())


@cache
def _largest(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`RowScaled.largest`, as a tensor: by a number torch divides by multiplying with its reciprocal, and rounds twice."""
    with torch.inference_mode(False):
        return torch.full((1,), RowScaled(dtype).largest, device=device)


def _rounded(steps_NI: Tensor, form: RowScaled) -> Tensor:
    """As `Quantized.values_NI`. Overwrites the steps."""
    if form.dtype.is_floating_point:
        return steps_NI.to(form.dtype)
    if form.parts == 2:
        coarse_NI = torch.round(steps_NI)
        return torch.cat((coarse_NI, steps_NI.sub_(coarse_NI).mul_(FINER).round_())).to(form.dtype)
    steps_NI.round_()
    if form.by is not None:
        ends = torch.iinfo(form.dtype)
        steps_NI.clamp_(ends.min, ends.max)
    return steps_NI.to(form.dtype)
