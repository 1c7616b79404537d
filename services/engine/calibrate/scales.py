"""Which weights the levels of a matrix reach to.

* absmax: to the lowest and the highest of each tile, so that none is cut off.
* percentile: so that so many percent of a tile's are not (as Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 3.3).
* mse: to that part of the way to the extremes at which the squared error of the tile is the least, by search; each input counting as its
  importance says. So weights are clipped in Lin et al. 2023, "AWQ", section 5.1, by the errors of products; with importances that are the inputs'
  squares this is their sum but for the products of different inputs.

Shapes: O outputs, I inputs; T tiles of outputs, U tiles of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.quant.matrix import QuantizedMatrix, Scheme, extremes, parameters, rounded, tiles_of
from services.engine.weight_format import Method

Parameters = tuple[Tensor, Tensor | None]
"""Scales, and zeros where a scheme has them, [T, U]."""

Finder = Callable[[Tensor], Parameters]
"""Gives a matrix, or whole tiles of one, its parameters."""

_RATIOS = tuple(1 - step / 40 for step in range(25))
"""Parts of the way to the extremes, 1 to 0.4."""


@dataclass(frozen=True, slots=True)
class Search:
    """How a matrix's parameters are found. Raises ValueError as `quant.matrix.extremes` does."""

    method: Method
    """`absmax`, `percentile` or `mse`."""
    scheme: Scheme
    scale_dtype: torch.dtype = torch.float32
    """To what scales are rounded before they are used."""
    percentile: float = 99.9
    importance_I: Tensor | None = None
    """For `mse`; None: all inputs alike."""

    def __call__(self, weight_OI: Tensor) -> Parameters:
        low_TU, high_TU = extremes(weight_OI, self.scheme)
        match self.method:
            case Method.ABSMAX:
                return self._parameters(low_TU, high_TU)
            case Method.PERCENTILE:
                return self._parameters(*self._percentiles(weight_OI, low_TU, high_TU))
            case Method.MSE:
                return self._least_error(weight_OI, low_TU, high_TU)
            case _:
                raise AssertionError(f"{self.method} finds no scales of weights")

    def rounded(self, weight_OI: Tensor) -> QuantizedMatrix:
        """The matrix to the nearest, by the parameters that are found."""
        return rounded(weight_OI, self.scheme, *self(weight_OI))

    def of(self, inputs: slice) -> Search:
        """The same for these inputs of the matrix alone."""
        if self.importance_I is None:
            return self
        return Search(self.method, self.scheme, self.scale_dtype, self.percentile, self.importance_I[inputs])

    def _parameters(self, low_TU: Tensor, high_TU: Tensor) -> Parameters:
        return parameters(low_TU, high_TU, self.scheme, scale_dtype=self.scale_dtype)

    def _percentiles(self, weight_OI: Tensor, low_TU: Tensor, high_TU: Tensor) -> tuple[Tensor, Tensor]:
        """The extremes without what is beyond the percentile: of absolute values, or on both sides where zero may lie anywhere."""
        tiles_TUX = self._by_tile(weight_OI.float())
        # Tiles that are cut off at the edge are filled with zeros, which are no weights: for them the percentile is a little low.
        size = tiles_TUX.shape[-1]
        if self.scheme.symmetric:
            kept = max(1, math.ceil(size * self.percentile / 100))
            limit_TU = tiles_TUX.abs().kthvalue(kept).values
            return low_TU.maximum(-limit_TU), high_TU.minimum(limit_TU)
        cut = min((size - 1) // 2, size - math.ceil(size * (1 + self.percentile / 100) / 2))
        return (
            tiles_TUX.kthvalue(1 + cut).values.clamp(max=0),
            tiles_TUX.kthvalue(size - cut).values.clamp(min=0),
        )

    def _least_error(self, weight_OI: Tensor, low_TU: Tensor, high_TU: Tensor) -> Parameters:
        best = self._parameters(low_TU, high_TU)
        least_TU = self._errors(weight_OI, best)
        for ratio in _RATIOS[1:]:
            tried = self._parameters(low_TU * ratio, high_TU * ratio)
            errors_TU = self._errors(weight_OI, tried)
            better_TU = errors_TU < least_TU
            least_TU = torch.where(better_TU, errors_TU, least_TU)
            best = _chosen(better_TU, tried, best)
        return best

    def _errors(self, weight_OI: Tensor, tried: Parameters) -> Tensor:
        """The squared error of each tile."""
        errors_OI = (rounded(weight_OI, self.scheme, *tried).dequant() - weight_OI).square_()
        if self.importance_I is not None:
            errors_OI *= self.importance_I
        return self._by_tile(errors_OI).sum(-1)

    def _by_tile(self, each_OI: Tensor) -> Tensor:
        """The values of each tile, [T, U, X]; zeros where it is cut off at the edge."""
        return tiles_of(each_OI, self.scheme).transpose(1, 2).flatten(2)


def _chosen(where_TU: Tensor, one: Parameters, other: Parameters) -> Parameters:
    scales_TU = torch.where(where_TU, one[0], other[0])
    if one[1] is None or other[1] is None:
        return scales_TU, None
    return scales_TU, torch.where(where_TU, one[1], other[1])
