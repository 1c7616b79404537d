"""Weights and activations in eight-bit floating point, e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

Each output of the matrix has a scale, found once, or all of them one; each row of activations has one, found in every step. Nothing is
calibrated. A single row on a GPU keeps its 16 bits: to round it would take kernels and save none of the bytes of the matrix.

Or blocks of the matrix have scales, and of a row of activations each 128 inputs (DeepSeek-AI 2024, "DeepSeek-V3", section 3.3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops import linear
from services.engine.ops.activation import silu_mul, silu_mul_quantized
from services.engine.ops.forms import Activations, Form, Quantized, RowScaled, Unnormed
from services.engine.ops.linear import counters_for
from services.engine.ops.norm import rms_norm_quantized
from services.engine.ops.quantize import by_torch, quantize
from services.engine.ops.scaled import COLUMNS, ROWS, packed, row_linear, scaled_linear, takes_row
from services.engine.quant import Buffers
from services.engine.quant.matrix import QuantizedMatrix, Scheme
from services.engine.quant.rounding import Rounding

_BLOCK = 128


class Fp8(Rounding):
    """Half the bytes of 16 bits to read, and on a GPU twice the products in a second. A CPU computes the same products,
    and gains nothing."""

    name = "fp8"
    scheme = Scheme(is_float=True)
    takes = RowScaled(torch.float8_e4m3fn)
    has_gpu_kernels = True

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        self._require(matrix, is_float=True, bits=8)
        outputs, inputs = matrix.shape
        if not matrix.is_symmetric or matrix.tile[1] < inputs:
            raise ValueError(
                f"{self.name} keeps a scale for each output, and it comes with one for each {matrix.tile[1]} inputs; say fp8-block"
            )
        if matrix.device.type == "cuda" and (outputs % ROWS or inputs % COLUMNS):
            raise ValueError(
                f"a GPU multiplies fp8 in tiles of {ROWS} outputs and {COLUMNS} inputs, and it has {outputs} outputs and {inputs} "
                f"inputs; keep such as they are, with a rule `glob=none` before the others"
            )
        matrix = matrix.in_tiles(1, inputs)
        values_OI = matrix.values_OI.contiguous()
        return packed(values_OI, dtype=dtype), matrix.scales_TU.view(outputs), *counters_for(values_OI)

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


class Fp8Tensor(Fp8):
    """One scale for the matrix. It is multiplied as if each output had it."""

    name = "fp8-tensor"
    scheme = Scheme(is_float=True, tile=(None, None))


class Fp8Block(Rounding):
    """A scale for each 128 x 128 weights, and for each 128 inputs of a row. On a CPU, where eight bits gain nothing, weights are kept
    as what they stand for."""

    name = "fp8-block"
    scheme = Scheme(is_float=True, tile=(_BLOCK, _BLOCK))

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        self._require(matrix, is_float=True, bits=8)
        return (linear.packed(matrix.dequant().to(dtype)),)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(x, Tensor)
        out_NO = linear.linear(_rounded(x).to(buffers[0].dtype), buffers[0]).float()
        return linear.plus(out_NO, bias_O, add).to(dtype)


def _rounded(x_NI: Tensor) -> Tensor:
    """Each 128 values as e4m3 by their own scale, in float32."""
    num_rows, inputs = x_NI.shape
    pieces = F.pad(x_NI, (0, -inputs % _BLOCK)).view(-1, _BLOCK)
    values, scales = by_torch(pieces, Fp8.takes)
    return (values.float() * scales[:, None]).view(num_rows, -1)[:, :inputs]
