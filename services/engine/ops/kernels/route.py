"""Which experts a token goes to: a token a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait


def route(logits_NE: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """As `ops.moe.route`, of dense logits; of experts that are equally likely the first. Experts are int32."""
    num_tokens, num_experts = logits_NE.shape
    weights_NA = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_NE.device)
    experts_NA = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits_NE.device)
    _route_experts[(num_tokens,)](
        logits_NE,
        weights_NA,
        experts_NA,
        E=num_experts,
        A=top_k,
        WIDTH=triton.next_power_of_2(num_experts),
        SLOTS=triton.next_power_of_2(top_k),
        NORMALIZE=normalize,
        num_warps=1,
        **overlapped(logits_NE),
    )
    return weights_NA, experts_NA


@triton.jit
def _route_experts(
    logits,
    weights,
    experts,
    E: tl.constexpr,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    wait(OVERLAP)
    scores = tl.load(logits + token * E + expert, mask=expert < E, other=-float("inf")).to(tl.float32)
    shares = tl.exp(scores - tl.max(scores, 0))
    shares = tl.where(expert < E, shares / tl.sum(shares, 0), -1.0)
    weight = tl.zeros((SLOTS,), tl.float32)
    chosen = tl.zeros((SLOTS,), tl.int32)
    for place in tl.static_range(A):
        best, at = tl.max(shares, 0, return_indices=True)
        # What is no number compares with nothing: it must not lead to an expert that there is not.
        at = tl.minimum(at, E - 1)
        weight = tl.where(slot == place, best, weight)
        chosen = tl.where(slot == place, at, chosen)
        shares = tl.where(expert == at, -1.0, shares)
    if NORMALIZE:
        weight = weight / tl.sum(weight, 0)
    tl.store(weights + token * A + slot, weight, mask=slot < A)
    tl.store(experts + token * A + slot, chosen, mask=slot < A)
