"""Log-probabilities of a chosen token and of the likeliest: a program for a row; no sort."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.candidates import Groups, Scratch, bound_of_count, collect
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
    scratch: Scratch,
    *,
    most: int,
) -> LogProbabilities:
    """Natural logarithms, of the model's own distribution: edited rows are read in `before_RV`. `groups` are those of a
    temperature of 1, before any edit. `most`: of the likeliest that a row may ask for."""
    num_rows, vocab_size = logits_RV.shape
    most = min(most, vocab_size)
    num_groups = groups.highest_RG.shape[1]
    chosen = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    top = torch.empty((num_rows, most), dtype=torch.float32, device=logits_RV.device)
    found = LogProbabilities(chosen, top, torch.empty_like(top, dtype=torch.int64))
    numbers = parameters.integers
    assert most * GROUP <= _MOST <= scratch.values_RC.shape[1]
    _report[(num_rows,)](
        logits_RV, before_RV, slots_R, chosen_R, numbers.reported, numbers.edited, numbers.num_top,
        *groups, *scratch, *found, logits_RV.stride(0), before_RV.stride(0), scratch.values_RC.stride(0), num_groups,
        VOCAB=vocab_size, GROUPS=triton.next_power_of_2(num_groups), GROUP=GROUP, TILE=2048, C=most, MOST=_MOST,
        num_warps=8,
    )  # fmt: skip
    return found


@triton.jit
def _report(
    logits, before, slots, chosen, reported, edited, num_tops,
    highest_of, mass_of, listed, values, ids, chosen_out, top_out, top_ids_out,
    row_stride, before_stride, list_stride, num_groups,
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
            lines, xs, tokens = listed + row * num_groups, values + row * list_stride, ids + row * list_stride
            end = collect(own, lines, xs, tokens, group, highest, inside, bound, 0, VOCAB, GROUP, TILE, MOST, ">")
            end = collect(own, lines, xs, tokens, group, highest, inside, bound, end, VOCAB, GROUP, TILE, MOST, "==")
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
