"""What all formats have in common that round weights.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul, silu_mul_quantized
from services.engine.ops.forms import Activations, Form, RowScaled
from services.engine.quant import Buffers, TableFormat, Weight
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest


class Rounding(ABC):
    """A format that keeps weights in few bits. What it can keep, and how, each of them says."""

    name: str
    """As rules name it."""
    scheme: Scheme
    takes: Form = None
    table: TableFormat | None = None
    rounds_products = False
    needs_input_scale = False
    has_gpu_kernels = False

    def pack(self, weight_OI: Weight, *, dtype: torch.dtype, input_scale: Tensor | None = None) -> Buffers:
        if weight_OI.device.type == "cuda" and not self.has_gpu_kernels:
            raise ValueError(f"{self.name} is multiplied on a CPU only so far; on a GPU, say fp8 or `*=none`")
        assert (input_scale is not None) == self.needs_input_scale
        matrix = weight_OI if isinstance(weight_OI, QuantizedMatrix) else self.rounded(weight_OI, dtype=dtype)
        return self._packed(matrix, dtype=dtype, input_scale=input_scale)

    def rounded(self, weight_OI: Tensor, *, dtype: torch.dtype) -> QuantizedMatrix:
        """The plain matrix as `pack` rounds it for activations in `dtype`. Raises ValueError as `pack` does."""
        return nearest(weight_OI, self.scheme)

    @abstractmethod
    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        """`pack` of what is rounded."""

    @abstractmethod
    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As `Format` says."""

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        gate_up = self.apply(x, buffers, bias_O=bias_O, add=None, dtype=dtype)
        return silu_mul_quantized(gate_up, form) if isinstance(form, RowScaled) else silu_mul(gate_up)

    def dequant(self, buffers: Buffers, *, inputs: int) -> Tensor:
        """Read out by the unit matrix, since only the kernel knows how the buffers lie; eight bits hold its ones exactly."""
        unit_II = torch.eye(inputs, device=buffers[0].device)
        return self.apply(unit_II, buffers, bias_O=None, add=None, dtype=torch.float32).t()

    def fake_quant(self, weight_OI: Tensor) -> Tensor:
        with torch.no_grad():
            change_OI = self.rounded(weight_OI, dtype=weight_OI.dtype).dequant().to(weight_OI.dtype) - weight_OI
        return weight_OI + change_OI

    def _require(self, matrix: QuantizedMatrix, *, is_float: bool, bits: int) -> None:
        """Raises ValueError for values of another kind."""
        if matrix.is_float != is_float or matrix.bits > bits or matrix.order_I is not None:
            kind = f"{'float' if matrix.is_float else 'int'}{matrix.bits}"
            order = ", and its inputs are sorted (act-order)" if matrix.order_I is not None else ""
            raise ValueError(f"{self.name} cannot keep it: its values are {kind}{order}")
