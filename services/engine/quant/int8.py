"""Weights in eight bits, as whole numbers with a scale for each output.

With activations in eight bits too, which have a scale for each row, found in every step (`Int8`; Dettmers et al. 2022, "LLM.int8()",
section 2), or one for all of them, found by calibration (`Int8Static`; Jacob et al. 2018, "Quantization and Training of Neural
Networks"); or with activations as they are (`Int8Weight`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops import int8
from services.engine.ops.forms import Form, Quantized, RowScaled
from services.engine.ops.linear import counters_for
from services.engine.quant import Buffers, TableFormat
from services.engine.quant.matrix import QuantizedMatrix, Scheme
from services.engine.quant.rounding import Rounding


class Int8(Rounding):
    """Half the bytes of 16 bits to read, and whole numbers to multiply. Rows can be looked up as they lie."""

    name = "int8"
    scheme = Scheme()
    takes: Form = RowScaled(torch.int8)
    rounds_activations = True

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
        values_OI = matrix.values_OI.contiguous()
        return values_OI, matrix.scales_TU.view(outputs), *counters_for(values_OI)

    def rows(self, buffers: Buffers, indices: Tensor, *, dtype: torch.dtype) -> Tensor:
        """These rows of the weights."""
        values_OI, scales_O = buffers[:2]
        rows: Tensor = values_OI[indices] * scales_O[indices][..., None]
        return rows.to(dtype)


class Int8Weight(Int8):
    """Activations as they are."""

    name = "int8-weight"
    takes: Form = None
    rounds_activations = False

    def form(self, buffers: Buffers) -> Form:
        return int8.form_for(buffers[0])

    def _products(
        self,
        x: Tensor | Quantized,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
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

    def form(self, buffers: Buffers) -> Form:
        return RowScaled(torch.int8, by=buffers[-1])

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        assert input_scale is not None
        if not (input_scale.isfinite() & (input_scale > 0)).all():
            raise ValueError(f"{self.name} needs an input_scale above zero, and this is {input_scale.item()}")
        return *super()._packed(matrix, dtype=dtype, input_scale=None), input_scale.float().view(1)

    def _products(
        self,
        x: Tensor | Quantized,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = self._rounded_rows(x, buffers)
        return super()._products(rows, buffers[:-1], bias_O=bias_O, add=add, dtype=dtype)

    def dequant(self, buffers: Buffers, *, inputs: int) -> Tensor:
        *matrix, scale = buffers
        return super().dequant((*matrix, torch.ones_like(scale)), inputs=inputs)
