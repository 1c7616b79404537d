"""What is done to which matrices, and how."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.calibrate.parts import Sharing
from services.engine.quant import Format
from services.engine.quant.matrix import Scheme
from services.engine.weight_format import Method


@dataclass(frozen=True, slots=True)
class Options:
    """What methods can be told."""

    percentile: float = 99.9
    """Of weights: how many are not cut off."""
    act_order: bool = True
    """GPTQ rounds inputs by their squares, the largest first."""
    damping: float = 0.01
    """GPTQ's, as a part of the mean square."""
    strength: float = 0.5
    """SmoothQuant's: how much of the difficulty of rounding goes from activations to weights."""
    activations: Method = Method.MSE
    """How static scales of activations are found."""
    activation_percentile: float = 99.99


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done to a matrix."""

    format: Format
    method: Method

    @property
    def quantizes(self) -> bool:
        """Whether it is rounded at all."""
        return self.format.scheme is not None

    @property
    def scheme(self) -> Scheme:
        """How it is rounded, if it is."""
        assert self.format.scheme is not None
        return self.format.scheme


@dataclass(frozen=True, slots=True)
class Choice(Treatment):
    """For matrices that share their inputs and are kept as one."""

    sharing: Sharing

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are scaled, and what stands before them takes it up. SmoothQuant's only by norms, as in the paper: what an MLP
        gives its second matrix is large now and then and not in some inputs always, and to move that into weights costs more than it saves."""
        if self.method is Method.SMOOTHQUANT:
            return self.quantizes and self.sharing.norm is not None
        return self.quantizes and self.method is Method.AWQ

    @property
    def needs_moments(self) -> bool:
        """Whether the method goes by what the matrices are given."""
        return self.scales_inputs or (self.quantizes and self.method is Method.GPTQ)

    @property
    def needs_magnitudes(self) -> bool:
        """Whether activations are to have a static scale."""
        return self.quantizes and self.format.needs_input_scale
