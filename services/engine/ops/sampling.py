"""From logits to tokens: the steps of sampling, each alone.

A token is drawn by Gumbel-max (Gumbel 1954; the arg max of log p_i + g_i with independent standard Gumbel noise g is
distributed as p) in two levels: first a group of 128 neighbouring tokens, by the groups' summed probabilities, then a
token of that group. Since the maximum of log p_i + g_i over a set is itself Gumbel with location log of the summed p
and independent of where it is reached (Maddison, Tarlow and Minka 2014, "A* sampling"), this gives exactly p, and the
noise for a row of V tokens is V / 128 + 128 numbers, not V.

The noise is a pure function of (seed, position, choice, group or place in the group): Philox4x32-10 (Salmon, Moraes,
Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") counts, it keeps no state. So the token drawn depends
neither on the batch nor on the row, and a small change of the logits rarely changes it.

Shapes: R rows, V vocabulary, C candidates, G groups.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP = 128
"""Tokens of a group: part of what a seed means."""

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = TypeVar("Words", Tensor, NDArray[np.int64])
"""32-bit words, one in each int64."""


def argmax(logits_RV: Tensor) -> Tensor:
    """The likeliest token of each row, int64; the lowest id among equals, a token with NaN where there is one."""
    if logits_RV.device.type == "cpu":
        # Ten times as fast as torch's, and the only one of the two that promises the first among equals.
        return torch.from_numpy(logits_RV.numpy().argmax(axis=-1))
    return logits_RV.argmax(dim=-1)


def penalize(
    logits_V: Tensor, history: Tensor, *, num_prompt: int, repetition: float, presence: float, frequency: float
) -> None:
    """Makes one row's tokens less likely for having occurred, in place. `history` are the ids of prompt and output.

    First tokens of either have their logit divided by `repetition` where it is positive and multiplied where not
    (Keskar et al. 2019, "CTRL"); then tokens of the output lose `presence` once and `frequency` each time they occur.
    """
    if repetition != 1:
        seen = logits_V[history]
        logits_V[history] = torch.where(seen > 0, seen / repetition, seen * repetition)
    output = history[num_prompt:]
    if presence:
        logits_V[output] = logits_V[output] - presence
    if frequency:
        logits_V.index_put_((output,), logits_V.new_tensor(-frequency).expand(len(output)), accumulate=True)


def probabilities(logits_RV: Tensor, temperature_R: Tensor | None = None) -> Tensor:
    """The distribution of each row, [R, V] float32, its logits divided by a temperature if one is given."""
    if temperature_R is None:
        return logits_RV.softmax(dim=-1)
    return (logits_RV / temperature_R[:, None]).softmax(dim=-1)


def keep_top_k(p_RV: Tensor, top_k_R: Tensor, *, most: int) -> Tensor:
    """Drops, in place, what is less likely than the k-th likeliest token of its row; its equals stay. A k of 0 keeps
    all. `most` is the largest k."""
    most = min(most, p_RV.shape[-1])
    values_RC, _ = likeliest(p_RV, most)
    last_R = values_RC.gather(1, (top_k_R - 1).clamp(0, most - 1)[:, None])
    return _drop_below(p_RV, torch.where(top_k_R[:, None] > 0, last_R, 0.0))


def keep_top_p(p_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Drops, in place, all but the fewest likeliest tokens of each row whose probabilities reach `top_p` of the row's
    sum (Holtzman et al. 2020, "The curious case of neural text degeneration"). Equals of the last one stay."""
    target_R = top_p_R * _sums(p_RV).sum(-1)
    floor_R = torch.empty_like(target_R)
    rows = torch.arange(len(p_RV), device=p_RV.device)
    for most in (64, 1024, p_RV.shape[-1]):
        values_RC, _ = likeliest(p_RV if len(rows) == len(p_RV) else p_RV[rows], min(most, p_RV.shape[-1]))
        # A token stays if those before it do not reach the target.
        before_RC = values_RC.cumsum(-1, dtype=torch.float64) - values_RC
        count_R = (before_RC < target_R[rows, None]).sum(-1).clamp_(min=1)
        floor_R[rows] = values_RC.gather(1, count_R[:, None] - 1)[:, 0]
        rows = rows[count_R == values_RC.shape[-1]]
        if not len(rows):
            break
    return _drop_below(p_RV, torch.where(top_p_R < 1, floor_R, 0.0)[:, None])


def keep_min_p(p_RV: Tensor, min_p_R: Tensor) -> Tensor:
    """Drops, in place, tokens less likely than `min_p` times the likeliest of their row."""
    return _drop_below(p_RV, (min_p_R * p_RV.amax(-1))[:, None])


def draw(p_RV: Tensor, *, seed_R2: Tensor, position_R: Tensor, choice_R: Tensor) -> Tensor:
    """A token of each row, int64, with probabilities proportional to `p_RV`: always the same one for a seed (its low
    and its high 32 bits), a position and a choice."""
    sums_RG = _sums(p_RV)
    num_groups = sums_RG.shape[-1]
    noise = gumbel((num_groups, GROUP), seed_R2=seed_R2, position_R=position_R, choice_R=choice_R)
    group_R1 = (sums_RG.log() + noise[:, :num_groups]).argmax(-1, keepdim=True)
    tokens_RC = group_R1 * GROUP + torch.arange(GROUP, device=p_RV.device)
    place_R1 = (_gather(p_RV, tokens_RC).log() + noise[:, num_groups:]).argmax(-1, keepdim=True)
    return tokens_RC.gather(1, place_R1)[:, 0]


def log_probabilities(logits_RV: Tensor, chosen_R: Tensor, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The natural log-probability of a chosen token of each row, [R], and those of the `most` likeliest, likeliest
    first, with their ids: [R, most] each."""
    total_R1 = logits_RV.logsumexp(-1, keepdim=True)
    values_RC, ids_RC = likeliest(logits_RV, min(most, logits_RV.shape[-1]))
    return (logits_RV.gather(1, chosen_R[:, None]) - total_R1)[:, 0], values_RC - total_R1, ids_RC


def likeliest(x_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, largest first, and their columns.

    They lie in the `count` runs of columns with the largest maxima, so only those are looked at closely."""
    width = 64
    num_runs = -(-x_RV.shape[-1] // width)
    if count == 0 or count * 4 > num_runs:
        values, columns = x_RV.topk(count, -1)
        return values, columns
    runs_RC = _reduce(x_RV, width, torch.amax).topk(count, -1, sorted=False).indices
    columns_RC = (runs_RC[:, :, None] * width + torch.arange(width, device=x_RV.device)).flatten(1)
    values, places = _gather(x_RV, columns_RC, outside=-torch.inf).topk(count, -1)
    return values, columns_RC.gather(1, places)


def gumbel(counts: tuple[int, ...], *, seed_R2: Tensor, position_R: Tensor, choice_R: Tensor) -> Tensor:
    """Standard Gumbel noise, [R, sum(counts)] float32, each count rounded up to a multiple of 4 being one series.

    Number i of series s is lane i & 3 of Philox4x32-10 at counter (i >> 2, position, choice, s) under the key `seed`.
    Its upper 23 bits x make u = (x + 0.5) / 2**23, which float32 holds exactly and which is never 0 or 1; the noise is
    -log(-log(u)), between -2.82 and 16.64.
    """
    raise NotImplementedError


def philox(counter: tuple[Words, Words, Words, Words], keys: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four random words for each counter of four words. `keys` are the ten rounds' keys, in the first
    dimension, as `round_keys` makes them of a key."""
    c0, c1, c2, c3 = counter
    for k0, k1 in zip(*keys, strict=True):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # The upper halves of c1 and c3 are not cleared before they meet c0 and c2.
        c0, c1 = ((product2 >> 32) ^ c1 ^ k0) & _LOW, product2
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _LOW, product0
    return c0, c1 & _LOW, c2, c3 & _LOW
