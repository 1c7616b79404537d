"""Weights as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul_as
from services.engine.ops.forms import Activations, Form, Quantized, RowScaled, Unnormed
from services.engine.ops.linear import counters_for, gated_linear, linear, packed
from services.engine.quant import Buffers, Weight
from services.engine.quant.matrix import plain


class Unrounded(ABC):
    """What formats have in common that keep the values as they are."""

    name = "none"
    takes: Form = None
    scheme = None
    table = None
    rounds_products = False
    rounds_activations = False
    needs_input_scale = False

    def adds(self, buffers: Buffers, *, num_rows: int) -> bool:
        return True

    def form(self, buffers: Buffers) -> Form:
        return self.takes

    @abstractmethod
    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As `Format` says."""

    def dequant(self, buffers: Buffers, *, inputs: int) -> Tensor:
        unit_II = torch.eye(inputs, dtype=buffers[0].dtype, device=buffers[0].device)
        return self.apply(unit_II, buffers, bias_O=None, add=None, dtype=unit_II.dtype).t().float()

    def fake_quant(self, weight_OI: Tensor, *, dtype: torch.dtype) -> Tensor:
        return weight_OI


class Unquantized(Unrounded):
    """The values as they are, laid out as the device multiplies fastest."""

    takes: Form = Unnormed

    def pack(self, weight_OI: Weight, *, dtype: torch.dtype, input_scale: Tensor | None = None) -> Buffers:
        plain_OI = plain(weight_OI, dtype)
        return (packed(plain_OI), *counters_for(plain_OI))

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
        return silu_mul_as(linear(x, *buffers, bias_O=bias_O), form)
