"""What a row's groups of tokens tell of its largest logits: the highest of each group, and how much of the group lies how far below."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.sampling import GROUP

STEPS = 16
"""Distances from a group's highest logit, (j / 4)^2 times the temperature: close together where most tokens are."""

_GROUPS = 16
"""Groups of a program."""


class Groups(NamedTuple):
    """The groups of each row: G of them."""

    highest_RG: Tensor
    masses_RG: Tensor
    """The sum of exp((x - highest) / temperature)."""
    tails_RJG: Tensor | None
    """The part of that sum which lies farther below the highest logit than each of the distances."""


def groups(logits_RV: Tensor, slots_R: Tensor, wanted_S: Tensor, temperatures_S: Tensor | None = None) -> Groups:
    """Of the rows whose slots want them. Without temperatures it is 1 for all, and there are no tails."""
    num_rows, vocab_size = logits_RV.shape
    num_groups = triton.cdiv(vocab_size, GROUP)
    highest_RG = torch.empty((num_rows, num_groups), dtype=torch.float32, device=logits_RV.device)
    masses_RG, tails_RJG = torch.empty_like(highest_RG), None
    if temperatures_S is not None:
        tails_RJG = torch.empty((num_rows, STEPS, num_groups), dtype=torch.float32, device=logits_RV.device)
    _weigh_groups[(triton.cdiv(num_groups, _GROUPS), num_rows)](
        logits_RV, slots_R, wanted_S, temperatures_S, highest_RG, masses_RG, tails_RJG,
        logits_RV.stride(0), num_groups, VOCAB=vocab_size, GROUPS=_GROUPS, GROUP=GROUP, STEPS=STEPS, num_warps=4,
    )  # fmt: skip
    return Groups(highest_RG, masses_RG, tails_RJG)


@triton.jit
def _weigh_groups(
    logits, slots, wanted, temperatures, highest, masses, tails, row_stride, num_groups,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if tl.load(wanted + slot) != 0:
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(logits + row * row_stride + token, mask=token < VOCAB, other=-float("inf"))
        top = tl.max(x, 1)
        distance = tl.where(top > -float("inf"), top, 0.0)[:, None] - x
        if temperatures is not None:
            distance = distance / tl.load(temperatures + slot)
        weight = tl.exp(-distance)
        out = row * num_groups + group
        tl.store(highest + out, top, mask=group < num_groups)
        tl.store(masses + out, tl.sum(weight, 1), mask=group < num_groups)
        if tails is not None:
            for step in tl.static_range(STEPS):
                beyond = tl.sum(tl.where(distance > step * step / 16, weight, 0.0), 1)
                tl.store(tails + (row * STEPS + step) * num_groups + group, beyond, mask=group < num_groups)


@triton.jit
def key_of(x):
    """float32 to int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def of_key(key):
    """The number whose key this is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def bound_of_count(highest, inside, count):
    """The `count`-th highest of the groups' highest logits: so many tokens reach it. The least finite number where fewer groups have a
    finite one."""
    least = -3.4028234663852886e38
    bound = least
    if count <= tl.sum((inside & (highest >= least)).to(tl.int32), 0):
        low = key_of(tl.min(tl.where(inside, tl.maximum(highest, least), float("inf")), 0)).to(tl.int64)
        high = key_of(tl.max(highest, 0)).to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            reaching = tl.sum((inside & (highest >= of_key(middle.to(tl.int32)))).to(tl.int32), 0)
            low = tl.where(reaching >= count, middle, low)
            high = tl.where(reaching >= count, high, middle)
        bound = of_key(low.to(tl.int32))
    return bound
