"""Weights and activations in eight-bit floating point, e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

Each output of the matrix has a scale, found once; each row of activations has one, found in every step. Nothing is
calibrated. A single row on a GPU keeps its 16 bits: to round it would take kernels and save none of the bytes of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.ops.activation import silu_mul, silu_mul_quantized
from services.engine.ops.forms import Activations, Form, Quantized, RowScaled, Unnormed
from services.engine.ops.linear import counters_for
from services.engine.ops.norm import rms_norm_quantized
from services.engine.ops.quantize import by_torch, quantize
from services.engine.ops.scaled import COLUMNS, ROWS, packed, row_linear, scaled_linear, takes_row
from services.engine.quant import Buffers

_ROWS_AT_ONCE = 1024


class Fp8:
    """Half the bytes of 16 bits to read, and on a GPU twice the products in a second. A CPU computes the same products,
    and gains nothing."""

    takes = RowScaled(torch.float8_e4m3fn)

    def pack(self, weight_OI: Tensor) -> Buffers:
        outputs, inputs = weight_OI.shape
        if weight_OI.is_cuda and (outputs % ROWS or inputs % COLUMNS):
            raise ConfigurationError(
                f"quantization: a GPU multiplies fp8 in tiles of {ROWS} outputs and {COLUMNS} inputs, and a matrix of this model "
                f"has {outputs} outputs and {inputs} inputs; keep such as they are, with a rule `glob=none` before the others"
            )
        # Some rows at a time: all of them in float32 would take twice the memory of the matrix.
        values_OI = torch.empty_like(weight_OI, dtype=self.takes.dtype)
        scales_O = torch.empty(outputs, device=weight_OI.device)
        for start in range(0, outputs, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            values_OI[rows], scales_O[rows] = by_torch(weight_OI[rows], self.takes)
        return packed(values_OI, dtype=weight_OI.dtype), scales_O, *counters_for(values_OI)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if takes_row(x, buffers[0]):
            return row_linear(x, *buffers[:2], bias_O=bias_O, add=add, dtype=dtype)
        return scaled_linear(self._in_eight_bits(x), *buffers, bias_O=bias_O, add=add, dtype=dtype)

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        if takes_row(x, buffers[0]):
            return row_linear(x, *buffers[:2], bias_O=bias_O, dtype=dtype, gated=True)
        gate_up = self.apply(x, buffers, bias_O=bias_O, add=None, dtype=dtype)
        return silu_mul_quantized(gate_up, form) if isinstance(form, RowScaled) else silu_mul(gate_up)

    def _in_eight_bits(self, x: Activations) -> Quantized:
        if isinstance(x, Unnormed):
            return rms_norm_quantized(*x, self.takes)
        return x if isinstance(x, Quantized) else quantize(x, self.takes)
