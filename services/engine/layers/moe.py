"""The mixture of experts that stands in an MLP's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.ops import moe
from services.engine.ops.forms import Activations, Form
from services.engine.weights import Weights

if TYPE_CHECKING:
    from services.engine.models.spec import MoESpec


class MoE:
    """Each token goes to the `top_k` experts that the router likes best."""

    def __init__(
        self, weights: Weights, spec: MoESpec, *, hidden: int, first: int = 0, count: int | None = None
    ) -> None:
        """With the experts [first, first + count) alone, all behind `first` if `count` is None, the layer computes their
        part of the sum; the router always is a whole one."""
        self._spec = spec
        self._shard = weights.shard
        self._router = Linear.load(weights, "gate", inputs=hidden, outputs=(spec.num_experts,))
        count = spec.num_experts - first if count is None else count
        assert 0 <= first < first + count <= spec.num_experts
        self._experts = _load(weights, spec, hidden=hidden, first=first, count=count)

    takes: Form = None
    """The router sees activations as they are."""

    def __call__(self, x_NI: Activations, *, add: Tensor | None = None) -> Tensor:
        assert isinstance(x_NI, Tensor)
        spec, add = self._spec, self._shard.once(add)
        out = moe.mixture(x_NI, self._router(x_NI), self._experts, top_k=spec.top_k, normalize=spec.normalize, add=add)
        return self._shard.all_reduce(out)


def _load(weights: Weights, spec: MoESpec, *, hidden: int, first: int, count: int) -> moe.Experts:
    """These experts out of a checkpoint, one after the other, each straight to where it stays."""
    size = spec.intermediate
    gate_up_EOI, down_EIF = (
        torch.empty(count, *shape, dtype=weights.dtype, device=weights.device)
        for shape in ((2 * size, hidden), (hidden, size))
    )
    gate, up, down = (f"{name}.weight" for name in spec.expert_names)
    for index in range(count):
        expert = weights.under(f"experts.{first + index}")
        expert.unquantized(*spec.expert_names, why="experts are multiplied in stacks of 16 or 32 bits")
        expert.fill(gate, gate_up_EOI[index, :size])
        expert.fill(up, gate_up_EOI[index, size:])
        expert.fill(down, down_EIF[index])
    return moe.Experts.of(gate_up_EOI, down_EIF, first=first, total=spec.num_experts, invariant=weights.invariant)
