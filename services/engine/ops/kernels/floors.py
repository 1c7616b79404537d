"""Top-k, top-p and min-p: the least logit that a token of a row must have. A program for a row; no sort.

What a row keeps are its likeliest tokens, so all that is looked for is where they end. The bound that makes candidates is exact:
no token that is kept is below it. The end is found by halving the numbers between the bound and the highest logit until none is left
between: some thirty readings of the candidates, or of the whole row where there is no room for so many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.candidates import MOST, Groups, Scratch, bound_of_count, collect, key_of, of_key
from services.engine.ops.parameters import Parameters
from services.engine.ops.sampling import GROUP


def floors(logits_RV: Tensor, groups: Groups, parameters: Parameters, slots_R: Tensor, scratch: Scratch) -> Tensor:
    """Of each row, [R] float32: minus infinity where all tokens stay. `groups` are those of the row's temperature."""
    num_rows, vocab_size = logits_RV.shape
    num_groups = groups.highest_RG.shape[1]
    floors_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    floats, integers = parameters.floats, parameters.integers
    _floor[(num_rows,)](
        logits_RV, slots_R, integers.shaped, floats.temperature, integers.top_k, floats.top_p, floats.min_p,
        *groups, *scratch, floors_R, logits_RV.stride(0), num_groups,
        VOCAB=vocab_size, GROUPS=triton.next_power_of_2(num_groups), GROUP=GROUP, TILE=2048, MOST=MOST, num_warps=8,
    )  # fmt: skip
    return floors_R


@triton.jit
def _floor(
    logits, slots, shaped, temperatures, top_ks, top_ps, min_ps,
    highest_of, mass_of, listed, values, ids, floors, row_stride, num_groups,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    floor = -float("inf")
    if tl.load(shaped + slot) != 0:
        temperature = tl.load(temperatures + slot)
        top_k, top_p, min_p = tl.load(top_ks + slot), tl.load(top_ps + slot), tl.load(min_ps + slot)
        group = tl.arange(0, GROUPS)
        inside = group < num_groups
        highest = tl.load(highest_of + row * num_groups + group, mask=inside, other=-float("inf"))
        mass = tl.load(mass_of + row * num_groups + group, mask=inside, other=0.0)
        peak = tl.max(highest, 0)
        if (top_k > 0) | (top_p < 1.0):
            weight = tl.where(inside, mass * tl.exp((highest - peak) / temperature), 0.0)
            total = tl.sum(weight, 0)
            bound = bound_of_count(highest, inside, top_k)
            if top_k == 0:
                bound = peak + temperature * _bound_of_mass(weight, total, (1.0 - top_p) * total, GROUPS, GROUP)
            row_logits = logits + row * row_stride
            count = collect(
                row_logits, listed + row * num_groups, values + row * MOST, ids + row * MOST,
                group, highest, inside, bound, 0, VOCAB, GROUP, TILE, MOST, ">=",
            )  # fmt: skip
            if count <= MOST:
                looked_at, length = values + row * MOST, count
            else:
                looked_at, length = row_logits, VOCAB
            floor = bound
            if top_k > 0:
                floor = _end(looked_at, length, floor, peak, top_k.to(tl.float32), temperature, False, TILE)
                total = _reaching(looked_at, length, floor, peak, temperature, True, TILE)
            if top_p < 1.0:
                floor = _end(looked_at, length, floor, peak, top_p * total, temperature, True, TILE)
        if min_p > 0.0:
            floor = tl.maximum(floor, peak + temperature * tl.log(min_p))
    tl.store(floors + row, floor)


@triton.jit
def _bound_of_mass(weight, total, spared, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The logarithm of a weight below which all tokens together weigh no more than is spared. Of a group no more is below than the
    group weighs, nor than its number of tokens of that weight."""
    low = tl.log(spared / (GROUPS * GROUP))
    high = low * 0.0
    for _ in range(12):
        middle = 0.5 * (low + high)
        # A little less than is spared, since sums are rounded.
        fits = tl.sum(tl.minimum(weight, GROUP * tl.exp(middle)), 0) <= 0.999 * spared
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return low


@triton.jit
def _end(logits, length, low, high, wanted, temperature, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest number that tokens reach who are as many, or weigh as much, as is wanted; `low` if none above it is."""
    first, last = key_of(low).to(tl.int64), key_of(high).to(tl.int64) + 1
    while last - first > 1:
        middle = (first + last) >> 1
        enough = _reaching(logits, length, of_key(middle.to(tl.int32)), high, temperature, BY_MASS, TILE) >= wanted
        first = tl.where(enough, middle, first)
        last = tl.where(enough, last, middle)
    return of_key(first.to(tl.int32))


@triton.jit
def _reaching(logits, length, floor, peak, temperature, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """How many tokens reach a floor, or what they weigh."""
    found = tl.zeros((TILE,), tl.float32)
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        x = tl.load(logits + at, mask=at < length, other=-float("inf"))
        worth = tl.exp((x - peak) / temperature) if BY_MASS else 1.0
        found += tl.where((at < length) & (x >= floor), worth, 0.0)
    return tl.sum(found, 0)
