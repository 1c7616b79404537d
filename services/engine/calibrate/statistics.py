"""What is kept of the inputs of a matrix, over all tokens of a text.

Shapes: N tokens, I inputs, B bins, L limits that are tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.weight_format import Method

LARGEST = 127
"""The whole number that the largest activation becomes."""

_BINS_PER_OCTAVE = 64
_LOWEST, _HIGHEST = -40, 24  # as exponents of two
_NUM_BINS = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE
_NARROWEST = 6  # octaves below the largest at which a limit is tried


class Moments:
    """Sums by which the error of a rounded matrix's products is known without the inputs: for a change D of the weights they are off
    by sum((D @ products) * D), in all."""

    def __init__(self, inputs: int, *, device: torch.device | str = "cpu") -> None:
        self.products_II = torch.zeros(inputs, inputs, device=device)
        """x.T @ x, the Hessian of the error but for a factor."""
        self.largest_I = torch.zeros(inputs, device=device)
        """Of absolute values,"""
        self._totals_I = torch.zeros(inputs, device=device)
        self.num_rows = 0

    def add(self, x_NI: Tensor) -> None:
        """Some more inputs."""
        x_NI = x_NI.float()
        sizes_NI = x_NI.abs()
        self.products_II.addmm_(x_NI.t(), x_NI)
        self.largest_I = torch.maximum(self.largest_I, sizes_NI.amax(0))
        self._totals_I += sizes_NI.sum(0)
        self.num_rows += len(x_NI)

    @property
    def mean_I(self) -> Tensor:
        """and their mean."""
        return self._totals_I / max(1, self.num_rows)

    @property
    def squares_I(self) -> Tensor:
        """The sum of each input's squares."""
        return self.products_II.diagonal()

    def divide(self, scales_I: Tensor) -> None:
        """Each input is divided by its scale."""
        self.products_II /= scales_I[:, None]
        self.products_II /= scales_I
        self.largest_I = self.largest_I / scales_I
        self._totals_I = self._totals_I / scales_I

    def check(self, *names: str) -> None:
        """Raises `ConfigurationError` if an input of the matrices of these names was not a finite number."""
        if not (self.largest_I.isfinite().all() and self.squares_I.isfinite().all()):
            raise ConfigurationError(
                f"{', '.join(names)}: the calibration text makes inputs that are not finite numbers; weights before it hold some "
                "that are not, or the model overflows: see what it says of this text unquantized"
            )


class Magnitudes:
    """How often absolute values of each size were seen, in bins of equal ratio: 1.1 % wide, which is what a limit is known to."""

    def __init__(self, importance_I: Tensor) -> None:
        """`importance_I`: how much an input's squared error weighs: as the squares of the weights that it meets do."""
        self._importance_I = importance_I.double()
        self._counts_B = torch.zeros(_NUM_BINS, dtype=torch.float64, device=importance_I.device)
        self._importances_B = torch.zeros_like(self._counts_B)
        self.largest = 0.0

    def add(self, x_NI: Tensor) -> None:
        """Some more inputs."""
        sizes_NI = x_NI.float().abs()
        self.largest = max(self.largest, float(sizes_NI.amax()))
        if not float(sizes_NI.sum()) < float("inf"):
            self.largest = float("nan")  # and stays so: every comparison with it is false
            return
        bins_NI = ((sizes_NI.log2() - _LOWEST) * _BINS_PER_OCTAVE).floor_().clamp_(0, _NUM_BINS - 1).long()
        bins, importance_NI = bins_NI.flatten(), self._importance_I.expand_as(sizes_NI)
        self._counts_B += torch.bincount(bins, minlength=_NUM_BINS)
        self._importances_B += torch.bincount(bins, importance_NI.flatten(), minlength=_NUM_BINS)

    def scale(self, method: Method, *, percentile: float, names: tuple[str, ...]) -> float:
        """By which values become whole numbers of eight bits. `absmax`: so that none is cut off. `percentile`: so that so many percent are
        not. `mse`: so that the squared error of the products is the least. Raises `ConfigurationError`, with these names, where there are no values to
        go by."""
        if not 0 < self.largest < float("inf"):
            raise ConfigurationError(
                f"{', '.join(names)}: activations cannot be given a static scale, for the calibration text makes them "
                f"{'all zero' if self.largest == 0 else 'other than finite numbers'}"
            )
        match method:
            case Method.ABSMAX:
                limit = self.largest
            case Method.PERCENTILE:
                limit = min(self.largest, self._percentile(percentile))
            case Method.MSE:
                limit = self._least_error()
            case _:
                raise AssertionError(f"{method} finds no scale of activations")
        return limit / LARGEST

    def _percentile(self, percentile: float) -> float:
        """What so many percent do not exceed, but for the width of a bin."""
        cumulated_B = self._counts_B.cumsum(0)
        found = int((cumulated_B < cumulated_B[-1] * percentile / 100).sum())
        return float(2 ** (_LOWEST + (found + 1) / _BINS_PER_OCTAVE))

    def _least_error(self) -> float:
        """The limit of the least squared error, of those down to a 64th of the largest: what is within is off by a uniform error of a
        step, or by itself where it is less than half a step; what is beyond by its distance (Banner et al. 2019, "Post training 4-bit
        quantization of convolutional networks", section 3)."""
        ratios_L = 2.0 ** -torch.arange(0, _NARROWEST, 1 / 16, dtype=torch.float64, device=self._counts_B.device)
        limits_L1 = (self.largest * ratios_L)[:, None]
        places_B = torch.arange(_NUM_BINS, dtype=torch.float64, device=self._counts_B.device) + 0.5
        sizes_B = 2.0 ** (_LOWEST + places_B / _BINS_PER_OCTAVE)
        steps_L1 = limits_L1 / LARGEST
        within_LB = torch.where(sizes_B < steps_L1 / 2, sizes_B**2, steps_L1**2 / 12)
        errors_LB = within_LB + (sizes_B - limits_L1).clamp(min=0) ** 2
        return float(limits_L1[int((errors_LB * self._importances_B).sum(1).argmin()), 0])
