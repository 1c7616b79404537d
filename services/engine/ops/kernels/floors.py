"""Top-k, top-p and min-p: the least logit that a token of a row must have. No sort.

What a row keeps are its likeliest tokens, so all that is looked for is where they end.

    _bracket    two numbers between which the end is certain to lie, from what the groups tell: a program for a row
    _list       the tokens between them, and how many and how much lie above: a program for a part of a row
    _floor      the numbers between the two are halved until none is left between: a program for a row

Where there is no room for the list, all of the row is looked at instead. Tokens are listed in any order, so what they weigh is
added up in whole numbers, of which the sum is always the same.

The specification keeps equals in probability, which float32 may make of logits that differ in the last place; here they must be equal logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.candidates import STEPS, Groups, bound_of_count, key_of, of_key
from services.engine.ops.parameters import Parameters
from services.engine.ops.sampling import GROUP

MOST = 8192
"""Tokens that a list has room for."""

_GROUPS = 16
"""Groups of a part."""

_UNIT = tl.constexpr(2.0**40)


def floors(logits_RV: Tensor, groups: Groups, parameters: Parameters, slots_R: Tensor) -> Tensor:
    """Of each row, [R] float32: minus infinity where all tokens stay. `groups` are those of the row's temperature."""
    num_rows, vocab_size = logits_RV.shape
    num_groups, device = groups.highest_RG.shape[1], logits_RV.device
    floors_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    bounds_R4 = torch.empty((num_rows, 4), dtype=torch.float32, device=device)
    above_R3 = torch.empty((num_rows, 3), dtype=torch.int64, device=device)
    listed_RC = torch.empty((num_rows, MOST), dtype=torch.float32, device=device)
    floats, integers = parameters.floats, parameters.integers
    asked = {
        "slots": slots_R, "shaped": integers.shaped, "temperatures": floats.temperature,
        "top_ks": integers.top_k, "top_ps": floats.top_p,
    }  # fmt: skip
    row = {"logits": logits_RV, "row_stride": logits_RV.stride(0), "VOCAB": vocab_size}
    shared = {"bounds": bounds_R4, "above": above_R3}
    _bracket[(num_rows,)](
        **asked, **shared, highest_of=groups.highest_RG, mass_of=groups.masses_RG, tails_of=groups.tails_RJG,
        num_groups=num_groups, GROUPS=triton.next_power_of_2(num_groups), GROUP=GROUP, STEPS=STEPS, num_warps=8,
    )  # fmt: skip
    _list[(triton.cdiv(num_groups, _GROUPS), num_rows)](
        **asked, **shared, **row, highest_of=groups.highest_RG, listed=listed_RC,
        num_groups=num_groups, GROUPS=_GROUPS, GROUP=GROUP, MOST=MOST, num_warps=4,
    )  # fmt: skip
    _floor[(num_rows,)](
        **asked, **shared, **row, min_ps=floats.min_p, listed=listed_RC, floors=floors_R,
        TILE=2048, MOST=MOST, num_warps=8,
    )  # fmt: skip
    return floors_R


@triton.jit
def _bracket(
    slots, shaped, temperatures, top_ks, top_ps, bounds, above, highest_of, mass_of, tails_of, num_groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`bounds`: a number that the end is not below, one that it is below, the highest logit, and what all tokens weigh, the likeliest
    1. `above`, which is zero behind this: how many tokens reach the second number, what they weigh, and how many are listed. Where top-k
    and top-p are asked for, that is for the end of top-k, which the other's is not below."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if tl.load(shaped + slot) != 0:
        temperature, top_k, top_p = tl.load(temperatures + slot), tl.load(top_ks + slot), tl.load(top_ps + slot)
        group = tl.arange(0, GROUPS)
        inside = group < num_groups
        highest = tl.load(highest_of + row * num_groups + group, mask=inside, other=-float("inf"))
        mass = tl.load(mass_of + row * num_groups + group, mask=inside, other=0.0)
        peak = tl.max(highest, 0)
        depth = (peak - highest) / temperature
        scale = tl.where(inside, tl.exp(-depth), 0.0)
        total = tl.sum(mass * scale, 0)
        low, high = peak, of_key(key_of(peak) + 1)
        if top_k > 0:
            low = bound_of_count(highest, inside, top_k)
        elif top_p < 1.0:
            tails = tails_of + row * STEPS * num_groups + group
            spared = (1.0 - top_p) * total
            far = _distance(tails, num_groups, mass, scale, depth, inside, spared, False, GROUPS * GROUP, STEPS)
            near = _distance(tails, num_groups, mass, scale, depth, inside, spared, True, GROUPS * GROUP, STEPS)
            rounding = 1e-4 * temperature + 1e-6 * tl.abs(peak)
            low, high = peak - temperature * far - rounding, peak - temperature * near + rounding
        tl.store(bounds + row * 4, low)
        tl.store(bounds + row * 4 + 1, high)
        tl.store(bounds + row * 4 + 2, peak)
        tl.store(bounds + row * 4 + 3, total)
        nothing = tl.zeros((4,), tl.int64)
        tl.store(above + row * 3 + tl.arange(0, 4), nothing, mask=tl.arange(0, 4) < 3)


@triton.jit
def _distance(
    tails, num_groups, mass, scale, depth, inside, spared, AT_LEAST: tl.constexpr, MOST_TOKENS: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """How far below the highest logit, in temperatures, so little lies beyond that it can be spared, or, with AT_LEAST, still so much
    that it cannot: both to the safe side."""
    near = spared * 0.0 - 1e-3
    far = -tl.log(spared / MOST_TOKENS)
    for _ in range(14):
        middle = 0.5 * (near + far)
        beyond = tl.sum(scale * _beyond(tails, num_groups, mass, inside, middle - depth, AT_LEAST, STEPS), 0)
        little = beyond <= (1.0001 if AT_LEAST else 0.9999) * spared  # sums are rounded
        near, far = tl.where(little, near, middle), tl.where(little, middle, far)
    return near if AT_LEAST else far


@triton.jit
def _beyond(tails, num_groups, mass, inside, distance, AT_LEAST: tl.constexpr, STEPS: tl.constexpr):
    """What of each group lies farther below its highest logit than this: at most, by the next of its tails that begins no farther;
    or at least, by the next that begins no nearer. All of it where the distance is negative."""
    step = 4.0 * tl.sqrt(tl.maximum(distance, 0.0))
    if AT_LEAST:
        number = tl.floor(step + 1e-5).to(tl.int32) + 1
        inside = inside & (number < STEPS)
    else:
        number = tl.floor(step - 1e-5).to(tl.int32)
    # Of a row that has no finite logits the distance is no number, and what is made of it may be any.
    number = tl.minimum(tl.maximum(number, 0), STEPS - 1)
    part = tl.load(tails + number * num_groups, mask=inside, other=0.0)
    return tl.where(distance < 0.0, mass, part)


@triton.jit
def _list(
    slots, shaped, temperatures, top_ks, top_ps, bounds, above, logits, row_stride, highest_of, listed, num_groups,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if (tl.load(shaped + slot) != 0) & ((tl.load(top_ks + slot) > 0) | (tl.load(top_ps + slot) < 1.0)):
        low, high, peak = tl.load(bounds + row * 4), tl.load(bounds + row * 4 + 1), tl.load(bounds + row * 4 + 2)
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        highest = tl.load(highest_of + row * num_groups + group, mask=group < num_groups, other=-float("inf"))
        if tl.max(highest, 0) >= low:
            token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            there = (token < VOCAB) & (highest >= low)[:, None]
            x = tl.load(logits + row * row_stride + token, mask=there, other=-float("inf")).reshape(GROUPS * GROUP)
            reaches = x >= high
            num_above = tl.sum(reaches.to(tl.int32), 0)
            if num_above > 0:
                tl.atomic_add(above + row * 3, num_above.to(tl.int64), sem="relaxed")
                weights = tl.where(reaches, _weight(x, peak, tl.load(temperatures + slot)), 0)
                tl.atomic_add(above + row * 3 + 1, tl.sum(weights, 0), sem="relaxed")
            between = (x >= low) & (x < high)
            number = tl.cumsum(between.to(tl.int32), 0)
            num_between = tl.sum(between.to(tl.int32), 0)
            if num_between > 0:
                first = tl.atomic_add(above + row * 3 + 2, num_between.to(tl.int64), sem="relaxed")
                place = first + number - 1
                tl.store(listed + row * MOST + place, x, mask=between & (place < MOST))


@triton.jit
def _floor(
    slots, shaped, temperatures, top_ks, top_ps, bounds, above, logits, row_stride, min_ps, listed, floors,
    VOCAB: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    floor = -float("inf")
    if tl.load(shaped + slot) != 0:
        temperature, min_p = tl.load(temperatures + slot), tl.load(min_ps + slot)
        top_k, top_p = tl.load(top_ks + slot), tl.load(top_ps + slot)
        low, high, peak = tl.load(bounds + row * 4), tl.load(bounds + row * 4 + 1), tl.load(bounds + row * 4 + 2)
        if (top_k > 0) | (top_p < 1.0):
            num_above, weight_above, length = (
                tl.load(above + row * 3),
                tl.load(above + row * 3 + 1),
                tl.load(above + row * 3 + 2),
            )
            looked_at = listed + row * MOST
            if length > MOST:
                looked_at, length = logits + row * row_stride, tl.full((), VOCAB, tl.int64)
                num_above, weight_above = num_above * 0, weight_above * 0
            floor = low
            total = (tl.load(bounds + row * 4 + 3).to(tl.float64) * _UNIT).to(tl.int64)
            if top_k > 0:
                floor = _end(looked_at, length, low, high, top_k - num_above, peak, temperature, False, TILE)
                total = weight_above + _reaching(looked_at, length, floor, peak, temperature, True, TILE)
            if top_p < 1.0:
                wanted = tl.maximum((total.to(tl.float64) * top_p).to(tl.int64), 1)
                floor = _end(looked_at, length, floor, high, wanted - weight_above, peak, temperature, True, TILE)
        if min_p > 0.0:
            floor = tl.maximum(floor, peak + temperature * tl.log(min_p))
    tl.store(floors + row, floor)


@triton.jit
def _end(logits, length, low, high, wanted, peak, temperature, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The largest number below `high` that so many tokens reach, or of such a weight; `low` if none above it is."""
    first, last = key_of(low).to(tl.int64), key_of(high).to(tl.int64)
    while last - first > 1:
        middle = (first + last) >> 1
        enough = _reaching(logits, length, of_key(middle.to(tl.int32)), peak, temperature, WEIGHED, TILE) >= wanted
        first = tl.where(enough, middle, first)
        last = tl.where(enough, last, middle)
    return of_key(first.to(tl.int32))


@triton.jit
def _reaching(logits, length, floor, peak, temperature, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """How many tokens reach a floor, or what they weigh, int64."""
    found = tl.zeros((TILE,), tl.int64)
    for first in range(0, length.to(tl.int32), TILE):
        at = first + tl.arange(0, TILE)
        x = tl.load(logits + at, mask=at < length, other=-float("inf"))
        worth = _weight(x, peak, temperature) if WEIGHED else 1
        found += tl.where((at < length) & (x >= floor), worth, 0)
    return tl.sum(found, 0)


@triton.jit
def _weight(x, peak, temperature):
    """In whole units, of which the likeliest token has 2^40: sums do not depend on an order."""
    return (tl.exp((x - peak) / temperature) * _UNIT).to(tl.int64)
