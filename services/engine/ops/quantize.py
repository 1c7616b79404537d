"""Activations in eight bits, each row with a scale of its own.

Shapes: N rows, I features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.forms import Quantized, RowScaled

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
    peaks_N = x_NI.abs().amax(-1).float().clamp_(min=SMALLEST)
    if not form.dtype.is_floating_point:
        scales_N = peaks_N.mul_(1 / form.largest)
        return Quantized((x_NI / scales_N[:, None]).round_().to(form.dtype), scales_N)
    # As a tensor: where one of the two is a number torch multiplies with a reciprocal, and rounds twice.
    largest_N = torch.full_like(peaks_N, form.largest)
    values_NI = (x_NI * (largest_N / peaks_N)[:, None]).to(form.dtype)
    return Quantized(values_NI, peaks_N / largest_N)


def quantize_by(x_NI: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """The rows of x as whole numbers, all by one scale; what is beyond them as the last of them. A row that holds a value which is
    not finite has a scale that is not."""
    lost_N = (x_NI * 0).sum(-1, dtype=torch.float32)
    ends = torch.iinfo(dtype)
    values_NI = (x_NI / scale).round_().clamp_(ends.min, ends.max)
    return Quantized(values_NI.to(dtype), scale + lost_N)
