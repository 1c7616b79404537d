"""Log-probabilities of a chosen token and of the likeliest: a program for a row; no sort."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.candidates import Groups, bound_of_count
from services.engine.ops.parameters import Parameters
from services.engine.ops.sampling import GROUP

_MOST = 4096
"""Candidates. Of `count` likeliest, fewer than `count` groups hold more than the last of them; equals fill up, the first ones."""


class LogProbabilities(NamedTuple):
    """Of each row that asked; nothing of the others."""

    chosen_R: Tensor
    top_RC: Tensor
    """Likeliest first; as many as the row asked for."""
    top_ids_RC: Tensor
    """int64."""


def log_probabilities(
    logits_RV: Tensor,
    before_RV: Tensor,
    chosen_R: Tensor,
    groups: Groups,
    parameters: Parameters,
    slots_R: Tensor,
    *,
    most: int,
) -> LogProbabilities:
    """Natural logarithms, of the model's own distribution: edited rows are read in `before_RV`. `groups` are those of a
    temperature of 1, before any edit. `most`: of the likeliest that a row may ask for."""
    num_rows, vocab_size = logits_RV.shape
    most, num_groups, device = min(most, vocab_size), groups.highest_RG.shape[1], logits_RV.device
    top_RC = torch.empty((num_rows, most), dtype=torch.float32, device=device)
    found = LogProbabilities(
        torch.empty(num_rows, dtype=torch.float32, device=device), top_RC, torch.empty_like(top_RC, dtype=torch.int64)
    )
    numbers = parameters.integers
    assert most * GROUP <= _MOST
    _report[(num_rows,)](
        logits=logits_RV, before=before_RV, row_stride=logits_RV.stride(0), before_stride=before_RV.stride(0),
        slots=slots_R, chosen=chosen_R, reported=numbers.reported, edited=numbers.edited, num_tops=numbers.num_top,
        highest_of=groups.highest_RG, mass_of=groups.masses_RG, num_groups=num_groups,
        listed=torch.empty_like(groups.highest_RG, dtype=torch.int32),
        values=torch.empty((num_rows, _MOST), dtype=torch.float32, device=device),
        ids=torch.empty((num_rows, _MOST), dtype=torch.int32, device=device),
        chosen_out=found.chosen_R, top_out=found.top_RC, top_ids_out=found.top_ids_RC,
        VOCAB=vocab_size, GROUPS=triton.next_power_of_2(num_groups), GROUP=GROUP, TILE=2048, C=most, MOST=_MOST,
        num_warps=8,
    )  # fmt: skip
    return found


@triton.jit
def _report(
    logits, before, row_stride, before_stride, slots, chosen, reported, edited, num_tops, highest_of, mass_of, num_groups,
    listed, values, ids, chosen_out, top_out, top_ids_out,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if tl.load(reported + slot) != 0:
        own = logits + row * row_stride
        if tl.load(edited + slot) != 0:
            own = before + row * before_stride
        group = tl.arange(0, GROUPS)
        inside = group < num_groups
        highest = tl.load(highest_of + row * num_groups + group, mask=inside, other=-float("inf"))
        mass = tl.load(mass_of + row * num_groups + group, mask=inside, other=0.0)
        peak = tl.max(highest, 0)
        total = peak + tl.log(tl.sum(tl.where(inside, mass * tl.exp(highest - peak), 0.0), 0))
        tl.store(chosen_out + row, tl.load(own + tl.load(chosen + row)) - total)
        count = tl.minimum(tl.load(num_tops + slot).to(tl.int32), C)
        if count > 0:
            bound = bound_of_count(highest, inside, count)
            bound = tl.where(bound > -3.4028234663852886e38, bound, -float("inf"))
            lines, xs, tokens = listed + row * num_groups, values + row * MOST, ids + row * MOST
            end = _collect(own, lines, xs, tokens, group, highest, inside, bound, 0, False, VOCAB, GROUP, TILE, MOST)
            end = _collect(own, lines, xs, tokens, group, highest, inside, bound, end, True, VOCAB, GROUP, TILE, MOST)
            at = tl.arange(0, MOST)
            left = at < end
            x = tl.load(xs + at, mask=left, other=-float("inf"))
            token = tl.load(tokens + at, mask=left, other=VOCAB)
            for place in range(count):
                best = tl.max(tl.where(left, x, -float("inf")), 0)
                first = tl.min(tl.where(left & (x == best), token, VOCAB), 0)
                tl.store(top_out + row * C + place, best - total)
                tl.store(top_ids_out + row * C + place, tl.minimum(first, VOCAB - 1).to(tl.int64))
                left = left & (token != first)


@triton.jit
def _collect(
    logits, listed, values, ids, group, highest, inside, bound, begin,
    EQUAL: tl.constexpr, VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Lists the tokens of a row that are above the bound, or equal to it, from entry `begin` on, by their ids, and says where the
    list ends, be there room for all or not."""
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
        kept = there & ((x == bound) if EQUAL else (x > bound))
        place = end + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + place, x, mask=kept & (place < MOST))
        tl.store(ids + place, token, mask=kept & (place < MOST))
        end += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return end
