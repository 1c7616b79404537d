"""Scales for the inputs of matrices: weights are multiplied with them, and what stands before is divided by them, so that the model
computes what it did, and rounding costs less.

* SmoothQuant (Xiao et al. 2022, equation 4): s = max|x|^a / max|w|^(1-a) takes from inputs what makes them hard to round in eight bits.
* AWQ (Lin et al. 2023, section 3.2): s = mean|x|^a gives inputs that are large more of a group's levels; a by a search for the least error of
  the products.

What stands before is a norm, whose weight is divided; or a matrix, whose rows are: values before the second matrix of attention, of which
several heads may read the same ones, and the upward matrix of an MLP before the downward one.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.engine.calibrate.statistics import Moments

_STEPS = 20
_LEAST = 1e-4


def smoothquant(weights: Sequence[Tensor], largest_I: Tensor, *, strength: float) -> Tensor:
    """Scales of the inputs that these matrices, [O, I], share. `strength`: how much of the difficulty goes from inputs to weights, 0 to 1."""
    weights_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0).float()
    return _usable(largest_I.clamp(min=_LEAST) ** strength / weights_I.clamp(min=_LEAST) ** (1 - strength))


def awq(
    weights: Sequence[Tensor],
    moments: Moments,
    back: Callable[[Tensor], Tensor],
    *,
    among: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scales of the inputs that these matrices share. `back`: a matrix rounded, and dequantized; `among`: for inputs that must have
    one scale, one mean."""
    mean_I = among(moments.mean_I).clamp(min=_LEAST)
    best_I, least = torch.ones_like(mean_I), float("inf")
    for step in range(_STEPS):
        scales_I = mean_I ** (step / _STEPS)
        scales_I = _usable(scales_I / (scales_I.amax() * scales_I.amin()).sqrt())
        error = sum(_error(back(weight_OI * scales_I) / scales_I - weight_OI, moments) for weight_OI in weights)
        if error < least:
            best_I, least = scales_I, error
    return best_I


def shared_by_heads(each_I: Tensor, *, heads: int, kv_heads: int) -> Tensor:
    """The mean over the heads that read the same values, for each of their inputs."""
    per_head = each_I.view(kv_heads, heads // kv_heads, -1)
    return per_head.mean(1, keepdim=True).expand_as(per_head).reshape(-1)


def per_value(scales_I: Tensor, *, heads: int, kv_heads: int) -> Tensor:
    """What heads share, once."""
    return scales_I.view(kv_heads, heads // kv_heads, -1)[:, 0].reshape(-1)


def _usable(scales_I: Tensor) -> Tensor:
    """None so small or large that weights would leave their dtype."""
    return scales_I.nan_to_num(nan=1.0, posinf=1.0).clamp(_LEAST, 1 / _LEAST)


def _error(change_OI: Tensor, moments: Moments) -> float:
    """How far products are off, squared and summed."""
    return float(((change_OI @ moments.products_II) * change_OI).sum())
