"""Weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul_quantized
from services.engine.ops.forms import Activations, Form, Quantized, RowScaled, Unnormed
from services.engine.ops.linear import counters_for, gated_linear, linear, packed
from services.engine.quant import Buffers


class Unquantized:
    """The values as they are, laid out as the device multiplies fastest."""

    takes: Form = Unnormed

    def pack(self, weight_OI: Tensor) -> Buffers:
        return packed(weight_OI), *counters_for(weight_OI)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(x, Unnormed) or (isinstance(x, Tensor) and x.dtype is dtype)
        return linear(x, *buffers, bias_O=bias_O, add=add)

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        assert not isinstance(x, Quantized)
        if not isinstance(form, RowScaled):
            return gated_linear(x, *buffers, bias_O=bias_O)
        return silu_mul_quantized(linear(x, *buffers, bias_O=bias_O), form)
