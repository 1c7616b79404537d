"""The mixture of experts that stands in an MLP's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.layers.mlp import GatedMLP
from services.engine.ops import moe
from services.engine.weights import Weights

if TYPE_CHECKING:
    from services.engine.models.spec import MoESpec


class MoE:
    """Each token goes to the `top_k` experts that the router likes best."""

    def __init__(self, weights: Weights, spec: MoESpec, *, hidden: int) -> None:
        self._spec = spec
        self._router = Linear.load(weights, "gate", inputs=hidden, outputs=(spec.num_experts,))
        self._experts = [
            GatedMLP(
                weights.under(f"experts.{index}"),
                hidden=hidden,
                intermediate=spec.intermediate,
                names=spec.expert_names,
            )
            for index in range(spec.num_experts)
        ]

    def __call__(self, x_NI: Tensor, *, add: Tensor) -> Tensor:
        weights_NA, experts_NA = moe.route(self._router(x_NI), top_k=self._spec.top_k, normalize=self._spec.normalize)
        return moe.mix(x_NI, weights_NA, experts_NA, self._experts).add_(add)
