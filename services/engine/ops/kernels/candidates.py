"""Finding the few largest logits of a row without sorting it.

A first kernel leaves the highest logit of each group of tokens, and how much the group weighs. From these follows a bound that none
of the wanted tokens is below; what reaches it are the candidates, and they alone are looked at closely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.sampling import GROUP

MOST = 8192
"""Candidates that a row has room for."""

_GROUPS = 16
"""Groups of a program."""


class Groups(NamedTuple):
    """The groups of each row: G of them."""

    highest_RG: Tensor
    masses_RG: Tensor
    """The sum of exp((x - highest) / temperature)."""


class Scratch(NamedTuple):
    """Where each row lists what it looks at closely."""

    listed_RG: Tensor
    """int32: groups."""
    values_RC: Tensor
    ids_RC: Tensor
    """int32."""

    @classmethod
    def of(cls, groups: Groups) -> Scratch:
        """For as many rows and groups."""
        num_rows, device = len(groups.highest_RG), groups.highest_RG.device
        return cls(
            torch.empty_like(groups.highest_RG, dtype=torch.int32),
            torch.empty((num_rows, MOST), dtype=torch.float32, device=device),
            torch.empty((num_rows, MOST), dtype=torch.int32, device=device),
        )


def groups(logits_RV: Tensor, slots_R: Tensor, wanted_S: Tensor, temperatures_S: Tensor | None = None) -> Groups:
    """Of the rows whose slots want them; of a temperature of 1 where none is given."""
    num_rows, vocab_size = logits_RV.shape
    num_groups = triton.cdiv(vocab_size, GROUP)
    highest_RG = torch.empty((num_rows, num_groups), dtype=torch.float32, device=logits_RV.device)
    found = Groups(highest_RG, torch.empty_like(highest_RG))
    _weigh_groups[(triton.cdiv(num_groups, _GROUPS), num_rows)](
        logits_RV, slots_R, wanted_S, temperatures_S, *found, logits_RV.stride(0), num_groups,
        VOCAB=vocab_size, GROUPS=_GROUPS, GROUP=GROUP, num_warps=4,
    )  # fmt: skip
    return found


@triton.jit
def _weigh_groups(
    logits, slots, wanted, temperatures, highest, masses, row_stride, num_groups,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if tl.load(wanted + slot) != 0:
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(logits + row * row_stride + token, mask=token < VOCAB, other=-float("inf"))
        top = tl.max(x, 1)
        distance = x - tl.where(top > -float("inf"), top, 0.0)[:, None]
        if temperatures is not None:
            distance = distance / tl.load(temperatures + slot)
        out = row * num_groups + group
        tl.store(highest + out, top, mask=group < num_groups)
        tl.store(masses + out, tl.sum(tl.exp(distance), 1), mask=group < num_groups)


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
    """The `count`-th highest of the groups' highest logits: so many tokens reach it. Minus infinity where there are fewer
    groups."""
    bound = -float("inf")
    if count <= tl.sum(inside.to(tl.int32), 0):
        low = key_of(tl.min(tl.where(inside, highest, float("inf")), 0)).to(tl.int64)
        high = key_of(tl.max(highest, 0)).to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            reaching = tl.sum((inside & (highest >= of_key(middle.to(tl.int32)))).to(tl.int32), 0)
            low = tl.where(reaching >= count, middle, low)
            high = tl.where(reaching >= count, high, middle)
        bound = of_key(low.to(tl.int32))
    return bound


@triton.jit
def collect(
    logits, listed, values, ids, group, highest, inside, bound, begin,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Lists the tokens of a row that reach the bound, from entry `begin` on, by their ids, and says where the list ends, be there
    room for all or not. HOW: `>=`, `>` or `==`."""
    chosen = inside & (highest >= bound)
    tl.store(listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, group, mask=chosen)
    tl.debug_barrier()
    length = tl.sum(chosen.to(tl.int32), 0) * GROUP
    end = begin
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        token = tl.load(listed + at // GROUP, mask=at < length, other=0) * GROUP + at % GROUP
        there = (at < length) & (token < VOCAB)
        x = tl.load(logits + token, mask=there, other=-float("inf"))
        if HOW == ">=":
            kept = there & (x >= bound)
        elif HOW == ">":
            kept = there & (x > bound)
        else:
            kept = there & (x == bound)
        place = end + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + place, x, mask=kept & (place < MOST))
        tl.store(ids + place, token, mask=kept & (place < MOST))
        end += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return end
