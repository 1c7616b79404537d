"""A mixture of experts (Shazeer et al. 2017): which experts a token goes to, and the sum of what they answer.

Shapes: N tokens, E experts, A experts of a token, I features in and out, F features of an expert, O = 2 * F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul
from services.engine.ops.linear import linear, packed


@dataclass(frozen=True, slots=True)
class Experts:
    """Gated MLPs that stand side by side: `count` neighbours of a layer's experts, from `first` on. Make it by `of`."""

    gate_up: tuple[Tensor, ...]
    """A matrix for each expert, as `linear` wants it, gate and then up; on a GPU the one stack of them."""
    down: tuple[Tensor, ...]
    first: int
    count: int
    total: int
    """How many the layer has, those that others hold among them."""
    invariant: bool = False
    """Whether a GPU must give a token the same bits whatever tokens stand beside it."""

    @classmethod
    def of(
        cls,
        gate_up_EOI: Tensor,
        down_EIF: Tensor,
        *,
        first: int = 0,
        total: int | None = None,
        invariant: bool = False,
    ) -> Experts:
        """The experts of these matrices, which are not to be used otherwise any more. `total`: by default no others
        follow."""
        count = len(gate_up_EOI)
        total = first + count if total is None else total
        if gate_up_EOI.is_cuda:
            return cls((gate_up_EOI,), (down_EIF,), first, count, total, invariant)
        gate_up, down = (tuple(packed(matrix) for matrix in stack) for stack in (gate_up_EOI, down_EIF))
        return cls(gate_up, down, first, count, total)


def mixture(
    x_NI: Tensor, logits_NE: Tensor, experts: Experts, *, top_k: int, normalize: bool, add: Tensor | None = None
) -> Tensor:
    """What the experts answer that a router's logits name: `mix` by `route`."""
    if x_NI.is_cuda:
        from services.engine.ops.kernels import moe

        return moe.mixture(x_NI, logits_NE, experts, top_k=top_k, normalize=normalize, add=add)
    weights_NA, experts_NA = route(logits_NE, top_k=top_k, normalize=normalize)
    return mix(x_NI, weights_NA, experts_NA, experts, add=add)


def route(logits_NE: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The likeliest experts of each token and their weights, both [N, top_k]: softmax over all experts in float32,
    made to add up to one again if `normalize`."""
    weights, experts = logits_NE.float().softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def mix(x_NI: Tensor, weights_NA: Tensor, experts_NA: Tensor, experts: Experts, *, add: Tensor | None = None) -> Tensor:
    """For each token the sum of its A experts' answers by weight, plus `add` where there is one, in the dtype of x. An
    expert that no token goes to is not run; one that is not among `experts` answers nothing. The result may take the
    place of `add`.

    An answer is that of a gated MLP in the dtype of x; weighing and adding up are in float32.
    """
    order = experts_NA.flatten().argsort(stable=True)
    tokens, weights = order // experts_NA.shape[1], weights_NA.flatten()[order, None]
    counts = torch.bincount(experts_NA.flatten(), minlength=experts.total).tolist()
    out = torch.zeros(x_NI.shape, dtype=torch.float32, device=x_NI.device)
    start = sum(counts[: experts.first])
    for gate_up_OI, down_IF, count in zip(experts.gate_up, experts.down, counts[experts.first :], strict=False):
        if count:
            rows = tokens[start : start + count]
            answer = linear(silu_mul(linear(x_NI[rows], gate_up_OI)), down_IF)
            out.index_add_(0, rows, answer.float() * weights[start : start + count])
            start += count
    return out.to(x_NI.dtype) if add is None else add.add_(out.to(x_NI.dtype))
