"""How a weight matrix is kept and multiplied.

A `Format` packs a matrix into buffers once, when it is loaded, and applies those buffers to activations in every step.
A `Linear` owns one format and its buffers and knows nothing else about either. Each format has a file here; `rules` knows
them by name, and says which matrix is kept in which. What comes in few bits already, from a checkpoint or from calibration, is
a `QuantizedMatrix`, which formats pack as it is.

A format may take activations in a form of its own. It makes them so itself, but the kernel that wrote them does so
for nothing: so a format says in what `form` it takes them, and what stands before a `Linear` may hand over just that.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from services.engine.ops.forms import Activations, Form
from services.engine.quant.matrix import QuantizedMatrix, Scheme

Buffers = tuple[Any, ...]
"""What a format made of a weight: tensors, and what it must know of them. Only that format reads it."""

Weight = Tensor | QuantizedMatrix
"""A matrix as it is, or in few bits."""


class Format(Protocol):
    """One way to keep a weight matrix."""

    name: str
    """As rules name it."""

    @property
    def takes(self) -> Form:
        """What it takes beside plain activations, of all buffers and on every device; of rows in eight bits it makes them itself where
        they are not."""
        ...

    @property
    def scheme(self) -> Scheme | None:
        """How it rounds a plain matrix; None if it keeps it as it is."""
        ...

    @property
    def table(self) -> TableFormat | None:
        """How it keeps a matrix of which rows are looked up, as an embedding's are; None if it cannot."""
        ...

    @property
    def rounds_products(self) -> bool:
        """Whether `apply` on a CPU rounds to the dtype that `pack` was told, whatever dtype is wanted. Then it keeps a table."""
        ...

    @property
    def rounds_activations(self) -> bool:
        """Whether it multiplies activations in eight bits: with scales found in every step, unless it `needs_input_scale`."""
        ...

    @property
    def needs_input_scale(self) -> bool:
        """Whether `pack` must be told the scale of activations."""
        ...

    def pack(self, weight_OI: Weight, *, dtype: torch.dtype, input_scale: Tensor | None = None) -> Buffers:
        """The matrix as this format keeps it, on the matrix's device, for activations in `dtype`: a plain one is rounded to the
        nearest. Raises ValueError, with what would be right, if it cannot keep this one or that device cannot multiply it."""
        ...

    def form(self, buffers: Buffers) -> Form:
        """What it `takes` of these buffers, which may say more."""
        ...

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x @ weight.T + bias + add, [N, O], in `dtype`; x is [N, I], as it was or in the form that the format takes. The
        result may take the place of `add`."""
        ...

    def adds(self, buffers: Buffers, *, num_rows: int) -> bool:
        """Whether `apply` to so many rows adds `add` in the kernel that multiplies, so that whoever reads the sum need not."""
        ...

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        """silu(gate) * up, [N, O / 2], where `apply` would give gate and then up; in this form if it is rows in eight
        bits."""
        ...

    def dequant(self, buffers: Buffers, *, inputs: int) -> Tensor:
        """The matrix that `apply` multiplies with, [O, I] in float32."""
        ...

    def fake_quant(self, weight_OI: Tensor, *, dtype: torch.dtype) -> Tensor:
        """What `pack` keeps of the plain matrix for activations in `dtype`, in the matrix's own dtype; its gradient is that of the plain one (straight-through
        estimator: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons")."""
        ...


class TableFormat(Format, Protocol):
    """One way to keep a matrix of which single rows are wanted."""

    def rows(self, buffers: Buffers, indices: Tensor, *, dtype: torch.dtype) -> Tensor:
        """These rows, [..., I], in `dtype`."""
        ...
