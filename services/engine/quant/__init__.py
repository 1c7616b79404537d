"""How a weight matrix is kept and multiplied.

A `Format` packs a matrix into buffers once, when it is loaded, and applies those buffers to activations in every step.
A `Linear` owns one format and its buffers and knows nothing else about either. Each format has a file here; `rules` knows
them by name, and says which matrix is kept in which.

A format may take activations in a form of its own. It makes them so itself, but the kernel that wrote them does so
for nothing: so a format says what it `takes`, and what stands before a `Linear` may hand over just that.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from services.engine.ops.forms import Activations, Form

Buffers = tuple[Tensor, ...]
"""What a format made of a weight. Only that format reads it."""


class Format(Protocol):
    """One way to keep a weight matrix."""

    @property
    def takes(self) -> Form:
        """What it takes beside plain activations; of rows in eight bits it makes them itself where they are not."""
        ...

    def pack(self, weight_OI: Tensor) -> Buffers:
        """The matrix as this format keeps it, on the matrix's device. Raises `ConfigurationError` if that device cannot multiply a
        matrix of this shape in this format."""
        ...

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x @ weight.T + bias + add, [N, O], in `dtype`; x is [N, I], as it was or in the form that the format takes. The
        result may take the place of `add`."""
        ...

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        """silu(gate) * up, [N, O / 2], where `apply` would give gate and then up; in this form if it is rows in eight
        bits."""
        ...
