"""A mixture of experts (Shazeer et al. 2017): which experts a token goes to, and the sum of what they answer."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor


def route(logits_NE: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The likeliest experts of each token and their weights, both [N, top_k]: softmax over all experts in float32,
    made to add up to one again if `normalize`."""
    weights, experts = logits_NE.float().softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def mix(x: Tensor, weights_NA: Tensor, experts_NA: Tensor, experts: Seq[Callable[[Tensor], Tensor]]) -> Tensor:
    """For each token the sum of its A experts' answers by weight, in the dtype of x. An expert that no token goes to
    is not run."""
    order = experts_NA.flatten().argsort(stable=True)
    tokens, weights = order // experts_NA.shape[1], weights_NA.flatten()[order, None]
    counts = torch.bincount(experts_NA.flatten(), minlength=len(experts)).tolist()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            rows = tokens[start : start + count]
            out.index_add_(0, rows, expert(x[rows]).float() * weights[start : start + count])
            start += count
    return out.to(x.dtype)
