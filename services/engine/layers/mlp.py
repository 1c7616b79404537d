"""The gated MLP."""

from __future__ import annotations

from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.ops.forms import Activations, Form, Terms
from services.engine.weight_format import GATE_UP
from services.engine.weights import Weights


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, weights: Weights, *, hidden: int, intermediate: int, bias: bool = False) -> None:
        self._shard = weights.shard
        part = weights.shard.even_part(intermediate, "features of the MLP")
        self._gate_up = Linear.load(weights, *GATE_UP, inputs=hidden, outputs=(part, part), bias=bias)
        self._down = Linear.load(weights, "down_proj", inputs=part, outputs=(hidden,), bias=bias)

    @property
    def takes(self) -> Form:
        return self._gate_up.takes

    def __call__(self, x_NI: Activations, *, add: Tensor) -> Terms:
        gated = self._gate_up.gated(x_NI, self._down.takes)
        return self._down.terms(gated, add, self._shard)
