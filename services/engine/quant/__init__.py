"""How a weight matrix is kept and multiplied.

A `Format` packs a matrix into buffers once, when it is loaded, and applies those buffers to activations in every step.
A `Linear` owns one format and its buffers and knows nothing else about either. `Unquantized` keeps the values it is
given; formats of fewer bits stand beside it as further classes.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Buffers = tuple[Tensor, ...]
"""What a format made of a weight. Only that format reads it."""


class Format(Protocol):
    """One way to keep a weight matrix."""

    def pack(self, weight_OI: Tensor) -> Buffers:
        """The matrix (outputs by inputs) as this format keeps it, on the matrix's device."""
        ...

    def apply(self, x: Tensor, buffers: Buffers, bias_O: Tensor | None) -> Tensor:
        """x @ weight.T + bias, in the dtype of x; x is [..., inputs]."""
        ...


class Unquantized:
    """The values as they are."""

    def pack(self, weight_OI: Tensor) -> Buffers:
        return (weight_OI,)

    def apply(self, x: Tensor, buffers: Buffers, bias_O: Tensor | None) -> Tensor:
        return F.linear(x, buffers[0], bias_O)
