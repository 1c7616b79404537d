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
        num_warps=4,
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
    slot = tl.arange(0, SLOTS)
    wait(OVERLAP)
    score, rank = ranked(logits + token * E, E, WIDTH)
    share = shares(score)
    is_slots = rank[None, :] == slot[:, None]
    chosen = chosen_by(is_slots, E, WIDTH)
    weight = tl.sum(tl.where(is_slots & (slot < A)[:, None], share[None, :], 0.0), 1)
    if NORMALIZE:
        weight = weight / tl.sum(weight, 0)
    tl.store(weights + token * A + slot, weight, mask=slot < A)
    tl.store(experts + token * A + slot, chosen, mask=slot < A)


@triton.jit
def ranked(logits, E: tl.constexpr, WIDTH: tl.constexpr):
    """A row's logits in float32, and how many experts come before each: those that are likelier, and of those as likely
    the ones before it. Every expert is compared with every other, at once: far sooner done than one after the other."""
    CHUNK: tl.constexpr = 32
    expert = tl.arange(0, WIDTH)
    score = tl.load(logits + expert, mask=expert < E, other=-float("inf")).to(tl.float32)
    rank = tl.zeros((WIDTH,), tl.int32)
    for start in tl.static_range(0, E, CHUNK):
        other = start + tl.arange(0, CHUNK)
        others = tl.load(logits + other, mask=other < E, other=-float("inf")).to(tl.float32)
        is_likelier = others[None, :] > score[:, None]
        is_as_likely = (others[None, :] == score[:, None]) & (other[None, :] < expert[:, None])
        rank += tl.sum((is_likelier | is_as_likely).to(tl.int32), 1)
    return score, rank


@triton.jit
def shares(score):
    """The softmax of a row."""
    share = tl.exp(score - tl.max(score, 0))
    return share / tl.sum(share, 0)


@triton.jit
def chosen_by(is_slots, E: tl.constexpr, WIDTH: tl.constexpr):
    """The expert of each slot, [SLOTS], whose row says which it is."""
    chosen = tl.sum(tl.where(is_slots, tl.arange(0, WIDTH)[None, :], 0), 1)
    # What is no number comes before nothing: it must not lead to an expert that there is not.
    return tl.minimum(chosen, E - 1)
