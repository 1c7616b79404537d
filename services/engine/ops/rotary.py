"""Rotary position embedding (Su et al. 2021, "RoFormer"), in the form where a head's first and second half are the two
coordinates that are turned."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Turns every head in place, computing in float32. `cos` and `sin` are float32 and repeat each half's angles; `sin`
    is negative in its first half, so that the turn is x * cos + (x with its halves swapped) * sin."""
    x = x_NHD.float()
    turned = torch.addcmul(x * cos_N1D, x.roll(x.shape[-1] // 2, -1), sin_N1D)
    return x_NHD.copy_(turned)
