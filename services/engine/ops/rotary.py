"""Rotary position embedding (Su et al. 2021, "RoFormer"), in the form where a head's first and second half are the two
coordinates that are turned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Cosine and signed sine at the step's positions, float32, for every layer: both repeat the angles of a head's first
    half in its second, and the sine is negative in the first."""

    cos_N1D: Tensor
    sin_N1D: Tensor


def angles(positions_N: Tensor, frequencies: Tensor, scale: float) -> Angles:
    """Those at these positions, of [D / 2] frequencies in radians a position; cosine and sine are multiplied with
    `scale`."""
    if positions_N.is_cuda:
        from services.engine.ops.kernels import rotary

        return Angles(*rotary.angles(positions_N, frequencies, scale))
    turns = positions_N[:, None, None].float() * frequencies
    cos, sin = turns.cos() * scale, turns.sin() * scale
    return Angles(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate_(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Turns every head in place, computing in float32: as x * cos + (x with its halves swapped) * sin, both as in `Angles`."""
    x = x_NHD.float()
    turned = torch.addcmul(x * cos_N1D, x.roll(x.shape[-1] // 2, -1), sin_N1D)
    return x_NHD.copy_(turned)
