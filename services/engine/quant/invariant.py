"""Weights as they are, multiplied so that a row's product does not depend on the rows beside it. For a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul
from services.engine.ops.forms import Activations, Form
from services.engine.quant import Buffers, Weight
from services.engine.quant.matrix import plain
from services.engine.quant.unquantized import Unrounded


class Invariant(Unrounded):
    """One kernel for any number of rows, slower than those that suit each number."""

    def pack(self, weight_OI: Weight, *, dtype: torch.dtype, input_scale: Tensor | None = None) -> Buffers:
        plain_OI = plain(weight_OI, dtype)
        return (plain_OI.contiguous(),)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        from services.engine.ops.kernels import invariant

        assert isinstance(x, Tensor)
        return invariant.matmul(x, *buffers, bias_O=bias_O, add=add, dtype=dtype)

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        assert form is None, "all matrices of a model are multiplied in this way"
        return silu_mul(self.apply(x, buffers, bias_O=bias_O, add=None, dtype=dtype))
