"""Weights in eight bits, as whole numbers with a scale for each output.

With activations in eight bits too, which have a scale for each row, found in every step (`Int8`; Dettmers et al. 2022, "LLM.int8()",
section 2), or one for all of them, found by calibration (`Int8Static`; Jacob et al. 2018, "Quantization and Training of Neural
Networks"); or with activations as they are (`Int8Weight`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops import int8, scaled
from services.engine.ops.forms import Activations, Form, Quantized, RowScaled, Unnormed
from services.engine.ops.quantize import quantize, quantize_by
from services.engine.quant import Buffers, TableFormat
from services.engine.quant.matrix import QuantizedMatrix, Scheme
from services.engine.quant.rounding import Rounding

_ROWS = RowScaled(torch.int8)


class Int8(Rounding):
    """Half the bytes of 16 bits to read, and whole numbers to multiply. Rows can be looked up as they lie."""

    name = "int8"
    scheme = Scheme()
    takes: Form = _ROWS

    @property
    def table(self) -> TableFormat:  # type: ignore[override]
        return self

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        self._require(matrix, is_float=False, bits=8)
        outputs, inputs = matrix.shape
        if not matrix.is_symmetric or matrix.tile[1] < inputs:
            has = "zero points" if not matrix.is_symmetric else f"a scale for each {matrix.tile[1]} of {inputs} inputs"
            raise ValueError(f"{self.name} keeps a scale for each output and no zero point, and it comes with {has}")
        matrix = matrix.in_tiles(1, inputs)
        return matrix.values_OI.contiguous(), matrix.scales_TU.view(outputs)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert not isinstance(x, Unnormed)
        rows = x if isinstance(x, Quantized) else quantize(x, _ROWS)
        return scaled.scaled_linear(rows, *buffers, bias_O=bias_O, add=add, dtype=dtype)

    def rows(self, buffers: Buffers, indices: Tensor, *, dtype: torch.dtype) -> Tensor:
        """These rows of the weights."""
        values_OI, scales_O = buffers
        rows: Tensor = values_OI[indices] * scales_O[indices][..., None]
        return rows.to(dtype)


class Int8Weight(Int8):
    """Activations as they are."""

    name = "int8-weight"
    takes: Form = None

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(x, Tensor)
        return int8.linear(x, *buffers, bias_O=bias_O, add=add, dtype=dtype)


class Int8Static(Int8):
    """And activations in eight bits, all by one scale, which comes with the model; what is beyond it counts as the largest. A table,
    which has none, is kept as `Int8` keeps it."""

    name = "int8-static"
    takes: Form = None
    needs_input_scale = True

    @property
    def table(self) -> TableFormat:  # type: ignore[override]
        return Int8()

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        assert input_scale is not None
        if not (input_scale.isfinite() & (input_scale > 0)).all():
            raise ValueError(f"{self.name} needs an input_scale above zero, and this is {input_scale.item()}")
        values_OI, scales_O = super()._packed(matrix, dtype=dtype, input_scale=None)
        return values_OI, scales_O, input_scale.float().view(1)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(x, Tensor)
        values_OI, scales_O, input_scale = buffers
        rows = quantize_by(x, input_scale, torch.int8)
        return scaled.scaled_linear(rows, values_OI, scales_O, bias_O=bias_O, add=add, dtype=dtype)

    def dequant(self, buffers: Buffers, *, inputs: int) -> Tensor:
        values_OI, scales_O, _ = buffers
        return super().dequant((values_OI, scales_O, scales_O.new_ones(1)), inputs=inputs)
