"""What all formats have in common that round weights.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeGuard

import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul_as
from services.engine.ops.forms import Activations, Form, Quantized, RowScaled, Unnormed
from services.engine.ops.norm import rms_norm_as
from services.engine.ops.quantize import quantize
from services.engine.ops.scaled import row_linear, scaled_linear, takes_row
from services.engine.quant import Buffers, TableFormat, Weight
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest


class Rounding(ABC):
    """A format that keeps weights in few bits. What it can keep, and how, each of them says.

    A single row on a GPU keeps its 16 bits, whatever others are rounded to: to round it would take kernels and save none of the
    bytes of the matrix. The first of the buffers is the matrix.
    """

    name: str
    """As rules name it."""
    scheme: Scheme
    takes: Form = None
    table: TableFormat | None = None
    rounds_products = False
    rounds_activations = False
    needs_input_scale = False

    def pack(self, weight_OI: Weight, *, dtype: torch.dtype, input_scale: Tensor | None = None) -> Buffers:
        assert (input_scale is not None) == self.needs_input_scale
        matrix = weight_OI if isinstance(weight_OI, QuantizedMatrix) else self.rounded(weight_OI, dtype=dtype)
        return self._packed(matrix, dtype=dtype, input_scale=input_scale)

    def rounded(self, weight_OI: Tensor, *, dtype: torch.dtype) -> QuantizedMatrix:
        """The plain matrix as `pack` rounds it for activations in `dtype`. Raises ValueError as `pack` does."""
        return nearest(weight_OI, self.scheme)

    @abstractmethod
    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        """`pack` of what is rounded."""

    def form(self, buffers: Buffers) -> Form:
        return self.takes

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if self._takes_row(x, buffers):
            return self._row(x, buffers, bias_O=bias_O, add=add, dtype=dtype)
        if isinstance(x, Unnormed):
            x = rms_norm_as(*x, self.form(buffers))
        return self._products(x, buffers, bias_O=bias_O, add=add, dtype=dtype)

    def adds(self, buffers: Buffers, *, num_rows: int) -> bool:
        return True

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        if self._takes_row(x, buffers):
            return self._row(x, buffers, bias_O=bias_O, dtype=dtype, gated=True)
        return silu_mul_as(self.apply(x, buffers, bias_O=bias_O, add=None, dtype=dtype), form)

    def _products(
        self,
        x: Tensor | Quantized,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """`apply` of rows that are normed: here of rows in the form, with a matrix that has scales."""
        return scaled_linear(self._rounded_rows(x, buffers), *buffers, bias_O=bias_O, add=add, dtype=dtype)

    def _rounded_rows(self, x: Tensor | Quantized, buffers: Buffers) -> Quantized:
        """Rows in the form, if they are not yet."""
        if isinstance(x, Quantized):
            return x
        form = self.form(buffers)
        assert isinstance(form, RowScaled)
        return quantize(x, form)

    def _takes_row(self, x: Activations, buffers: Buffers) -> TypeGuard[Tensor | Unnormed]:
        """Whether `_row` multiplies these activations."""
        return takes_row(x, buffers[0])

    def _row(
        self,
        x: Tensor | Unnormed,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None = None,
        dtype: torch.dtype,
        gated: bool = False,
    ) -> Tensor:
        """`apply` or `gated` of a single row on a GPU."""
        weight_OI, scales_O = buffers[:2]
        return row_linear(x, weight_OI, scales_O, bias_O=bias_O, add=add, dtype=dtype, gated=gated)

    def dequant(self, buffers: Buffers, *, inputs: int) -> Tensor:
        """Read out by the unit matrix, since only the kernel knows how the buffers lie; eight bits hold its ones exactly."""
        unit_II = torch.eye(inputs, device=buffers[0].device)
        return self.apply(unit_II, buffers, bias_O=None, add=None, dtype=torch.float32).t()

    def fake_quant(self, weight_OI: Tensor, *, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            kept_OI = self._kept(weight_OI.to(dtype), dtype=dtype).dequant().to(weight_OI.dtype)
        return kept_OI + (weight_OI - weight_OI.detach())  # that is zero, and has the gradient

    def _kept(self, weight_OI: Tensor, *, dtype: torch.dtype) -> QuantizedMatrix:
        """What the buffers of `pack` stand for."""
        return self.rounded(weight_OI, dtype=dtype)

    def _require(self, matrix: QuantizedMatrix, *, is_float: bool, bits: int) -> None:
        """Raises ValueError for values of another kind."""
        if matrix.is_float != is_float or matrix.bits > bits or matrix.order_I is not None:
            kind = f"{'float' if matrix.is_float else 'int'}{matrix.bits}"
            order = ", and its inputs are sorted (act-order)" if matrix.order_I is not None else ""
            raise ValueError(f"{self.name} cannot keep it: its values are {kind}{order}")
