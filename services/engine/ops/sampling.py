"""From logits to tokens: the steps of sampling, each alone.

A token is drawn by Gumbel-max (Gumbel 1954; the arg max of log p_i + g_i with independent standard Gumbel noise g is
distributed as p) in two levels: first a group of 128 neighbouring tokens, by the groups' summed probabilities, then a
token of that group. Since the maximum of log p_i + g_i over a set is itself Gumbel with location log of the summed p
and independent of where it is reached (Maddison, Tarlow and Minka 2014, "A* sampling"), this gives exactly p, and the
noise for a row of V tokens is V / 128 + 128 numbers, not V.

The noise is a pure function of (seed, position, choice, group or place in the group): Philox4x32-10 (Salmon, Moraes,
Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") counts, it keeps no state. So the token drawn depends
neither on the batch nor on the row, and a small change of the logits rarely changes it.

Shapes: R rows, V vocabulary, C candidates or counters, G groups.
"""

from __future__ import annotations

import math
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

_RUN = 64

Words = TypeVar("Words", Tensor, NDArray[np.int64])
"""32-bit words, one in each int64."""


def argmax(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, int64, and its logit. The lowest id among equals; NaN counts as the largest."""
    if logits_RV.device.type == "cpu":
        # Ten times as fast as torch's, and the only one of the two that promises the first among equals.
        rows_RV = logits_RV.numpy()
        ids_R = rows_RV.argmax(axis=-1)
        return torch.from_numpy(ids_R), torch.from_numpy(rows_RV[np.arange(len(ids_R)), ids_R])
    values_R, ids_R = logits_RV.max(dim=-1)
    return ids_R, values_R


def penalize(
    logits_V: Tensor, history: Tensor, *, num_prompt: int, repetition: float, presence: float, frequency: float
) -> None:
    """Makes one row's tokens less likely for having occurred, in place. `history` are the ids of prompt and output.

    Tokens of either first have their logit divided by `repetition` where it is positive and multiplied where not
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
    """The distribution of each row, its logits divided by a temperature if one is given. Takes the logits' place."""
    if temperature_R is not None:
        logits_RV.div_(temperature_R[:, None])
    return torch.softmax(logits_RV, dim=-1, out=logits_RV)


def keep_top_k(p_RV: Tensor, top_k_R: Tensor, *, most: int) -> Tensor:
    """Drops, in place, what is less likely than the k-th likeliest token of its row; its equals stay. A k of 0 keeps
    all. `most` is the largest k."""
    most = min(most, p_RV.shape[-1])
    values_RC, _ = likeliest(p_RV, most)
    last_R = values_RC.gather(1, (top_k_R - 1).clamp(0, most - 1)[:, None])[:, 0]
    return _drop_below(p_RV, torch.where(top_k_R > 0, last_R, 0.0))


def keep_top_p(p_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Drops, in place, all but the fewest likeliest tokens of each row whose probabilities reach `top_p` of the row's
    sum (Holtzman et al. 2020, "The curious case of neural text degeneration"). Equals of the last one stay; 1 keeps
    all."""
    if p_RV.device.type == "cpu":
        floors = [_nucleus_floor(p_V, top_p) for p_V, top_p in zip(p_RV.numpy(), top_p_R.tolist(), strict=True)]
        return _drop_below(p_RV, torch.tensor(floors))
    return _drop_below(p_RV, nucleus_floors(p_RV, top_p_R))


def nucleus_floors(p_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """How likely a token of each row must be to stay under `keep_top_p`."""
    values_RV = p_RV.sort(-1, descending=True).values
    before_RV = values_RV.cumsum(-1, dtype=torch.float64) - values_RV
    # A token stays as long as those before it do not reach the target.
    target_R = top_p_R.double() * values_RV.sum(-1, dtype=torch.float64)
    count_R = (before_RV < target_R[:, None]).sum(-1).clamp_(min=1)
    return torch.where(top_p_R < 1, values_RV.gather(1, count_R[:, None] - 1)[:, 0], 0.0)


def _nucleus_floor(p_V: NDArray[np.float32], top_p: float) -> float:
    """The same for one row, at less than a tenth of the cost. The tokens dropped sum up to (1 - top_p) of all, so none
    of V tokens that is less likely than a V-th of that stays, and few are left to sort."""
    total = float(p_V.sum())
    if top_p >= 1 or math.isnan(total):
        return 0.0
    values = np.sort(p_V[p_V >= (1 - top_p) * total / len(p_V) * 0.999])[::-1]  # 0.999, for `total` is rounded
    before = values.cumsum(dtype=np.float64) - values
    count = int(np.count_nonzero(before < top_p * total))
    return float(values[max(count, 1) - 1])


def keep_min_p(p_RV: Tensor, min_p_R: Tensor) -> Tensor:
    """Drops, in place, tokens less likely than `min_p` times the likeliest of their row."""
    return _drop_below(p_RV, min_p_R * p_RV.amax(-1))


def draw(p_RV: Tensor, *, seed_R2: Tensor, position_R: Tensor, choice_R: Tensor) -> Tensor:
    """A token of each row, int64, with probabilities proportional to `p_RV`: always the same one for a seed (its low
    and its high 32 bits), a position and a choice."""
    sums_RG = _run_sums(p_RV, GROUP)
    place_noise, group_noise = gumbel(
        (GROUP, sums_RG.shape[-1]), seed_R2=seed_R2, position_R=position_R, choice_R=choice_R
    )
    group_R1 = (sums_RG.log() + group_noise).argmax(-1, keepdim=True)
    tokens_RC = group_R1 * GROUP + torch.arange(GROUP, device=p_RV.device)
    place_R1 = (_gather(p_RV, tokens_RC, beyond=0.0).log() + place_noise).argmax(-1, keepdim=True)
    return tokens_RC.gather(1, place_R1)[:, 0]


def log_probabilities(logits_RV: Tensor, chosen_R: Tensor, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The natural log-probability of a chosen token of each row, [R]; and those of the `most` likeliest, likeliest
    first, with their ids, [R, most] each."""
    total_R1 = logits_RV.logsumexp(-1, keepdim=True)
    values_RC, ids_RC = likeliest(logits_RV, min(most, logits_RV.shape[-1]))
    return (logits_RV.gather(1, chosen_R[:, None]) - total_R1)[:, 0], values_RC - total_R1, ids_RC


def likeliest(x_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, largest first, and their columns.

    They lie in the `count` runs of columns with the largest maxima, so only those are looked at closely."""
    num_runs = -(-x_RV.shape[-1] // _RUN)
    if count * 2 > num_runs:
        values, columns = x_RV.topk(count, -1)
        return values, columns
    runs_RC = _run_maxima(x_RV, _RUN).topk(count, -1, sorted=False).indices
    columns_RC = (runs_RC[:, :, None] * _RUN + torch.arange(_RUN, device=x_RV.device)).flatten(1)
    values, places = _gather(x_RV, columns_RC, beyond=-torch.inf).topk(count, -1)
    return values, columns_RC.gather(1, places)


def gumbel(counts: tuple[int, ...], *, seed_R2: Tensor, position_R: Tensor, choice_R: Tensor) -> list[Tensor]:
    """Series of standard Gumbel noise, [R, count] float32 for each count.

    Number i of series s is lane i & 3 of Philox4x32-10 at counter (i >> 2, position, choice, s) under the key `seed`.
    Its upper 23 bits x make u = (x + 0.5) / 2**23, which float32 holds exactly and which is never 0 or 1; the noise is
    -log(-log(u)), between -2.82 and 16.64.
    """
    device = position_R.device
    sizes = [-(-count // 4) for count in counts]
    first_C = torch.cat([torch.arange(size, device=device) for size in sizes])
    series_C = torch.cat([torch.full((size,), series, device=device) for series, size in enumerate(sizes)])
    counter = (first_C, position_R[:, None], choice_R[:, None], series_C)
    words_RC4 = _random_words(counter, (seed_R2[:, :1], seed_R2[:, 1:]))
    uniform = (words_RC4 >> 9).float().add_(0.5).mul_(2.0**-23)
    noise = uniform.log_().neg_().log_().neg_().flatten(1)
    parts = torch.split(noise, [4 * size for size in sizes], dim=1)
    return [part[:, :count] for part, count in zip(parts, counts, strict=True)]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four random words for each counter of four words, under a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1, c3, k0 and k1 carry more than 32 bits, which are cut off where they meet c0 and c2.
        c0, c1 = ((product2 >> 32) ^ c1 ^ k0) & _LOW, product2
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _LOW, product0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1 & _LOW, c2, c3 & _LOW


def _random_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """The words of `philox`, in a last dimension of 4."""
    if key[0].device.type == "cpu":
        # A hundred small operations, which cost half as much in numpy.
        c0, c1, c2, c3, k0, k1 = (each.numpy() for each in (*counter, *key))
        return torch.from_numpy(np.stack(philox((c0, c1, c2, c3), (k0, k1)), axis=-1))
    return torch.stack(philox(counter, key), dim=-1)


def _drop_below(p_RV: Tensor, floor_R: Tensor) -> Tensor:
    if p_RV.device.type == "cpu":
        # Row by row nothing leaves the processor's cache, and nothing is allocated. What equals the floor stays.
        below = torch.nextafter(floor_R, floor_R - 1).tolist()
        for p_V, floor in zip(p_RV, below, strict=True):
            torch.threshold_(p_V, floor, 0.0)
        return p_RV
    return p_RV.masked_fill_(p_RV < floor_R[:, None], 0.0)


def _run_sums(x_RV: Tensor, width: int) -> Tensor:
    """The sum of each run of `width` columns; the last one may be shorter."""
    whole, rest = _runs(x_RV, width)
    sums = whole.sum(-1)
    return torch.cat((sums, rest.sum(-1, keepdim=True)), dim=1) if rest.shape[-1] else sums


def _run_maxima(x_RV: Tensor, width: int) -> Tensor:
    """The largest entry of each run of `width` columns; the last one may be shorter."""
    whole, rest = _runs(x_RV, width)
    maxima = whole.amax(-1)
    return torch.cat((maxima, rest.amax(-1, keepdim=True)), dim=1) if rest.shape[-1] else maxima


def _runs(x_RV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = x_RV.shape
    num_runs = num_columns // width
    end = num_runs * width
    return x_RV[:, :end].view(num_rows, num_runs, width), x_RV[:, end:]


def _gather(x_RV: Tensor, columns_RC: Tensor, *, beyond: float) -> Tensor:
    """The entries of these columns, `beyond` where there is none."""
    num_columns = x_RV.shape[-1]
    values_RC = x_RV.gather(1, columns_RC.clamp(max=num_columns - 1))
    return values_RC.masked_fill_(columns_RC >= num_columns, beyond)
