"""Weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.linear import counters_for, linear, packed
from services.engine.ops.quantize import Activations, RowScaled
from services.engine.quant import Buffers


class Unquantized:
    """The values as they are, laid out as the device multiplies fastest."""

    takes: RowScaled | None = None

    def pack(self, weight_OI: Tensor) -> Buffers:
        return packed(weight_OI), *counters_for(weight_OI)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(x, Tensor) and x.dtype is dtype
        return linear(x, *buffers, bias_O=bias_O, add=add)
