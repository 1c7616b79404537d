"""How a weight matrix is kept and multiplied.

A `Format` packs a matrix into buffers once, when it is loaded, and applies those buffers to activations in every step.
A `Linear` owns one format and its buffers and knows nothing else about either. `Unquantized` keeps the values it is
given; formats of fewer bits stand beside it as further classes.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from services.engine.ops.linear import counters_for, linear, packed

Buffers = tuple[Tensor, ...]
"""What a format made of a weight. Only that format reads it."""


class Format(Protocol):
    """One way to keep a weight matrix."""

    def pack(self, weight_OI: Tensor) -> Buffers:
        """The matrix as this format keeps it, on the matrix's device."""
        ...

    def apply(self, x: Tensor, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None) -> Tensor:
        """x @ weight.T + bias + add, in the dtype of x; x is [..., I], the result and `add` [..., O]."""
        ...


class Unquantized:
    """The values as they are, laid out as the device multiplies fastest."""

    def pack(self, weight_OI: Tensor) -> Buffers:
        return packed(weight_OI), *counters_for(weight_OI)

    def apply(self, x: Tensor, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None) -> Tensor:
        return linear(x, *buffers, bias_O=bias_O, add=add)
