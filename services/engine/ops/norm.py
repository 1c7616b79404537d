"""Root mean square norm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.forms import Form, Quantized, Unsummed, rounds, summed
from services.engine.ops.quantize import quantize

# Up to so many rows, torch's eight kernels for the norm cost more on a CPU than the work they do.
_FEW_ROWS = 32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32, in the dtype of x."""
    if x.is_cuda:
        from services.engine.ops.kernels import norm

        return norm.rms_norm(x, weight, eps)
    size = weight.shape[0]
    if x.is_cpu and x.numel() <= _FEW_ROWS * size:
        # The mean of (x, -x) is zero and its variance the mean square of x, so torch's one fused kernel for layer norm
        # computes the same.
        return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=eps)[..., :size] * weight
    return F.rms_norm(x, (size,), weight, eps)


def rms_norm_as(x_NI: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor | Quantized:
    """`rms_norm`, and of what that gives `quantize` where rows are wanted so."""
    if not rounds(form, len(x_NI)):
        return rms_norm(x_NI, weight, eps)
    if x_NI.is_cuda:
        from services.engine.ops.kernels import norm

        return norm.rms_norm_quantized(x_NI, weight, eps, form)
    return quantize(rms_norm(x_NI, weight, eps), form)


def rms_norm_of_sum(terms: Unsummed, weight: Tensor, eps: float, form: Form) -> Tensor | Quantized:
    """`rms_norm_as` of the sum, which takes the place of what is added, rounded to its dtype."""
    if not terms.x_NI.is_cuda:
        return rms_norm_as(summed(terms), weight, eps, form)
    from services.engine.ops.kernels import norm

    if rounds(form, len(terms.x_NI)):
        return norm.rms_norm_quantized(terms.x_NI, weight, eps, form, add_NI=terms.add_NI)
    return norm.rms_norm(terms.x_NI, weight, eps, add=terms.add_NI)
