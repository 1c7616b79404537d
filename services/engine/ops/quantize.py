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
    # As a tensor: where one of the two is a number torch multiplies with a reciprocal, and rounds twice.
    largest_N = torch.full_like(peaks_N, form.largest)
    values_NI = (x_NI * (largest_N / peaks_N)[:, None]).to(form.dtype)
    return Quantized(values_NI, peaks_N / largest_N)
