"""The angles by which queries and keys are turned at each position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.ops.rotary import Angles, angles


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies divided by one factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies divided, high ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN: a ramp between dividing and keeping, and longer cosines and sines."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    """What cosine and sine are multiplied with."""
    truncate: bool
    """Whether the ramp begins and ends at whole features."""


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """How positions turn queries and keys."""

    theta: float
    dim: int
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


class Rotary:
    """Angles from positions. There is no table: a step needs them once, for all layers."""

    def __init__(self, spec: RotarySpec, *, device: torch.device) -> None:
        frequencies, self._scale = _frequencies(spec)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions_N: Tensor) -> Angles:
        return angles(positions_N, self._frequencies, self._scale)


def _frequencies(spec: RotarySpec) -> tuple[Tensor, float]:
    """Radians a position for each pair of features, and what cosine and sine are multiplied with."""
    plain = 1.0 / (spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim))
    match spec.scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor=factor):
            return plain / factor, 1.0
        case Llama3Scaling():
            return _llama3(plain, spec.scaling), 1.0
        case YarnScaling():
            return _yarn(plain, spec), spec.scaling.attention_factor


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long waves are slowed by the factor, short ones kept, and those between blended (Llama 3.1's own scheme)."""
    turns = scaling.original_positions * plain / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return plain * keep + plain / scaling.factor * (1 - keep)


def _yarn(plain: Tensor, spec: RotarySpec) -> Tensor:
    """Features that turn often over the original context are kept, those that turn seldom slowed by the factor, with
    a ramp between (Peng et al. 2023, "YaRN", section 3.2)."""
    scaling = spec.scaling
    assert isinstance(scaling, YarnScaling)

    def feature(turns: float) -> float:
        return spec.dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = (torch.arange(spec.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return plain / scaling.factor * slow + plain * (1 - slow)
