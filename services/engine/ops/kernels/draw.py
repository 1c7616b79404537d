"""A token of each row: the likeliest, or one drawn by the two-level Gumbel-max of `ops.sampling`. No sort, no softmax, and
one reading of the logits.

The first kernel looks at a part of the vocabulary each: its largest logit, and for rows that are drawn from the group of
tokens with the largest sum of probabilities under noise, both as logarithms. The second takes the best part, draws a
token of its group and writes it where the next step finds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.parameters import Parameters
from services.engine.ops.sampling import GROUP

_GROUPS = 16
"""Groups of a part."""


def draw(
    logits_RV: Tensor,
    parameters: Parameters,
    slots_R: Tensor,
    positions_R: Tensor,
    tokens: Tensor,
    *,
    floors_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next tokens, [R] int64, and the largest logit of each row, [R]. Rows of a temperature of 0 take the likeliest; others
    are drawn from the tokens whose logits reach the row's floor, if there is one.

    `tokens`, [slots, length] int32, gets each row's token at its slot and position.
    """
    num_rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == 1, "a row's logits lie side by side"
    num_parts = triton.cdiv(vocab_size, _GROUPS * GROUP)
    device = logits_RV.device
    peaks_RC = torch.empty((num_rows, num_parts), dtype=torch.float32, device=device)
    places_RC = torch.empty((num_rows, num_parts), dtype=torch.int32, device=device)
    scores_RC, groups_RC = torch.empty_like(peaks_RC), torch.empty_like(places_RC)
    token_ids_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    peaks_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    numbers = parameters.integers
    rows = {
        "logits": logits_RV, "row_stride": logits_RV.stride(0), "floors": floors_R, "slots": slots_R, "positions": positions_R,
        "temperatures": parameters.floats.temperature,
        "seeds_low": numbers.seed_low, "seeds_high": numbers.seed_high, "choices": numbers.choice,
    }  # fmt: skip
    parts = {"peaks": peaks_RC, "places": places_RC, "scores": scores_RC, "groups": groups_RC}
    _best[(num_parts, num_rows)](**rows, **parts, VOCAB=vocab_size, GROUPS=_GROUPS, GROUP=GROUP, num_warps=4)
    _choose[(num_rows,)](
        **rows, **parts, tokens=tokens, token_ids=token_ids_R, peaks_out=peaks_R,
        token_stride=tokens.stride(0), num_parts=num_parts,
        VOCAB=vocab_size, PARTS=triton.next_power_of_2(num_parts), GROUP=GROUP, num_warps=4,
    )  # fmt: skip
    return token_ids_R, peaks_R


@triton.jit
def _gumbel(index, position, choice, series, low, high):
    """Number `index` of a series, as `ops.sampling.gumbel` defines it."""
    zero = tl.zeros_like(index)
    seed = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    a, b, c, d = tl.philox(
        seed,
        (index >> 2).to(tl.uint32),
        (zero + position).to(tl.uint32),
        (zero + choice).to(tl.uint32),
        (zero + series).to(tl.uint32),
    )
    lane = index & 3
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _best(
    logits, row_stride, floors, slots, positions, temperatures, seeds_low, seeds_high, choices,
    peaks, places, scores, groups,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    group = part * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < VOCAB, other=-float("inf"))
    out = row * tl.num_programs(0) + part
    highest = tl.max(x, 1)
    # The first among equals; NaN, which no comparison finds, makes the peak NaN.
    spoiled = tl.sum(tl.sum((x != x).to(tl.int32), 1), 0) > 0
    peak = tl.max(highest, 0)
    first = tl.min(tl.min(tl.where(x == peak, token, VOCAB), 1), 0)
    tl.store(peaks + out, tl.where(spoiled, float("nan"), peak))
    tl.store(places + out, tl.minimum(first, VOCAB - 1))
    slot = tl.load(slots + row).to(tl.int64)
    temperature = tl.load(temperatures + slot)
    if temperature > 0:
        top = highest / temperature
        some = top > -float("inf")
        origin = tl.where(some, top, 0.0)
        weight = tl.exp(x / temperature - origin[:, None])
        if floors is not None:
            weight = tl.where(x >= tl.load(floors + row), weight, 0.0)
        mass = tl.sum(weight, 1)
        noise = _gumbel(
            group,
            tl.load(positions + row),
            tl.load(choices + slot),
            1,
            tl.load(seeds_low + slot),
            tl.load(seeds_high + slot),
        )
        score = tl.where(some, origin + tl.log(mass) + noise, -float("inf"))
        best = tl.max(score, 0)
        tl.store(scores + out, best)
        tl.store(groups + out, tl.min(tl.where(score == best, group, 2147483647), 0))


@triton.jit
def _choose(
    logits, row_stride, floors, slots, positions, temperatures, seeds_low, seeds_high, choices,
    peaks, places, scores, groups,
    tokens, token_ids, peaks_out, token_stride, num_parts, VOCAB: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    there = part < num_parts
    at = row * num_parts + part
    peak_of = tl.load(peaks + at, mask=there, other=-float("inf"))
    spoiled = tl.sum((peak_of != peak_of).to(tl.int32), 0) > 0
    peak = tl.max(peak_of, 0)
    chosen = tl.min(tl.where(peak_of == peak, tl.load(places + at, mask=there, other=VOCAB - 1), VOCAB - 1), 0)
    slot = tl.load(slots + row).to(tl.int64)
    temperature = tl.load(temperatures + slot)
    position = tl.load(positions + row)
    if temperature > 0:
        score = tl.load(scores + at, mask=there, other=-float("inf"))
        best = tl.max(score, 0)
        group = tl.min(tl.where(score == best, tl.load(groups + at, mask=there, other=0), 2147483647), 0)
        group = tl.minimum(group, (VOCAB - 1) // GROUP)
        place = tl.arange(0, GROUP)
        token = group * GROUP + place
        x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < VOCAB, other=-float("inf"))
        noise = _gumbel(
            place, position, tl.load(choices + slot), 0, tl.load(seeds_low + slot), tl.load(seeds_high + slot)
        )
        shaken = x / temperature + noise
        if floors is not None:
            shaken = tl.where(x >= tl.load(floors + row), shaken, -float("inf"))
        chosen = tl.min(tl.where(shaken == tl.max(shaken, 0), token, VOCAB - 1), 0)
    tl.store(token_ids + row, chosen.to(tl.int64))
    tl.store(peaks_out + row, tl.where(spoiled, float("nan"), peak))
    tl.store(tokens + slot * token_stride + position, chosen.to(tl.int32))
