"""What activations may look like on their way to a matrix.

A format of weights says which form it takes; what stands before the matrix hands over that, if it can do so for nothing.

Shapes: N rows, I features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowScaled:
    """A row is scaled so that its largest value becomes the largest of `dtype`, and then rounded."""

    dtype: torch.dtype

    @property
    def largest(self) -> float:
        return float((torch.finfo if self.dtype.is_floating_point else torch.iinfo)(self.dtype).max)


class Quantized(NamedTuple):
    """Rows as values_NI * scales_N[:, None]. A row that held a value which is not finite holds one still."""

    values_NI: Tensor
    scales_N: Tensor
    """float32."""


class Unnormed(NamedTuple):
    """One row whose norm is left to whoever multiplies it: a kernel less."""

    x_1I: Tensor
    weight_I: Tensor
    eps: float


Activations = Tensor | Quantized | Unnormed
"""What a matrix is multiplied with."""

Form = RowScaled | type[Unnormed] | None
"""What a matrix takes beside plain activations: rows in eight bits, a row before its norm, or nothing else."""
