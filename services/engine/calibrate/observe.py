"""A layer whose tensors can be changed, and whose matrices say what they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.models.spec import ModelSpec
from services.engine.ops.activation import silu_mul
from services.engine.ops.forms import Activations, Form
from services.engine.ops.linear import plus
from services.engine.quant import Buffers, Format, Weight
from services.engine.quant.matrix import plain
from services.engine.quant.unquantized import Unrounded
from services.engine.shard import Part
from services.engine.weights import Weights

See = Callable[[Tensor], None]
"""Is told what a matrix is given, [N, I]."""


class Observed(Unrounded):
    """Weights as they are, and somebody who looks on."""

    def __init__(self, see: See) -> None:
        self._see = see

    def pack(self, weight_OI: Weight, *, dtype: torch.dtype, input_scale: Tensor | None = None) -> Buffers:
        return (plain(weight_OI, dtype),)

    def apply(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert isinstance(x, Tensor)
        self._see(x)
        return plus(F.linear(x, *buffers), bias_O, add).to(dtype)

    def gated(
        self, x: Activations, buffers: Buffers, *, bias_O: Tensor | None, dtype: torch.dtype, form: Form
    ) -> Activations:
        assert form is None
        return silu_mul(self.apply(x, buffers, bias_O=bias_O, add=None, dtype=dtype))


class Held(Weights):
    """Tensors of other weights, kept when they are first taken, by the names of the checkpoint; what is changed here is what the next
    layer that is made of them has. Experts, which nothing changes, are read anew each time."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(dtype=weights.dtype, device=weights.device, shard=weights.shard)
        self._weights = weights
        self.tensors: dict[str, Tensor] = {}
        self.seen_by: Mapping[str, See] = {}
        """Who is told of the inputs of matrices, by the name of the first of those that share them."""

    def take(self, name: str, *shape: int | Part) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self._weights.take(name, *shape)
        return self.tensors[name]

    def fill(self, name: str, out: Tensor) -> None:
        self._weights.fill(name, out)

    def leave(self, prefix: str) -> None:
        self._weights.leave(prefix)

    def input_scale(self, *names: str) -> Tensor:
        raise AssertionError("what is observed is not quantized")

    def format(self, *names: str) -> Format:
        return Observed(self.seen_by.get(names[0], _nobody))


def one_layer(spec: ModelSpec, layer: int) -> ModelSpec:
    """A model of this layer alone."""
    moe = spec.moe
    if moe is not None:
        moe = replace(moe, layers=frozenset({0} if layer in moe.layers else ()))
    return replace(spec, layers=1, windows=(spec.windows[layer],), moe=moe)


def _nobody(x_NI: Tensor) -> None:
    """Nobody looks on."""
