"""Weights and activations in eight-bit floating point, e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

Each output of the matrix has a scale, found once, or all of them one; each row of activations has one, found in every step. Nothing is
calibrated.

Or blocks of the matrix have scales, and of a row of activations each 128 inputs (DeepSeek-AI 2024, "DeepSeek-V3", section 3.3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops import linear, scaled
from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.linear import counters_for
from services.engine.ops.quantize import dequantize
from services.engine.ops.scaled import COLUMNS, ROWS, blocks, packed
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
    rounds_activations = True

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

    def adds(self, buffers: Buffers, *, num_rows: int) -> bool:
        weight_OI, scales_O = buffers[:2]
        return scaled.adds(weight_OI, scales_O, num_rows=num_rows)


class Fp8Tensor(Fp8):
    """One scale for the matrix. It is multiplied as if each output had it."""

    name = "fp8-tensor"
    scheme = Scheme(is_float=True, tile=(None, None))


class Fp8Block(Rounding):
    """A scale for each 128 x 128 weights, and for each 128 inputs of a row. On a CPU, where eight bits gain nothing, weights are kept
    as what they stand for."""

    name = "fp8-block"
    scheme = Scheme(is_float=True, tile=(_BLOCK, _BLOCK))
    takes = RowScaled(torch.float8_e4m3fn, share=_BLOCK)
    rounds_activations = True

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        self._require(matrix, is_float=True, bits=8)
        if not matrix.values_OI.is_cuda:
            return (linear.packed(matrix.dequant().to(dtype)),)
        values_OI = matrix.values_OI.contiguous()
        return values_OI, blocks(matrix.scales_TU, matrix.tile, matrix.shape), *counters_for(values_OI)

    def _products(
        self,
        x: Tensor | Quantized,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        weight_OI = buffers[0]
        if weight_OI.is_cuda:
            return super()._products(x, buffers, bias_O=bias_O, add=add, dtype=dtype)
        rows_NI = dequantize(self._rounded_rows(x, buffers), self.takes)
        out_NO = linear.linear(rows_NI.to(weight_OI.dtype), weight_OI).float()
        return linear.plus(out_NO, bias_O, add).to(dtype)
