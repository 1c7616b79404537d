"""From the logits of a step to its tokens: a list of small steps, each skipped where no row wants it.

    penalties, bias, min_tokens     change some logits of a row (`EDITS`)
    temperature, top-k, top-p, min-p     shape the distribution of the rows that are drawn from (`SHAPES`)
    draw     a token by the row's own noise; all other rows take the likeliest

Reported log-probabilities are of the model's own distribution, before any of it. Where every row is greedy and nothing
else is asked for, a step is one arg max.

Shapes: R rows to sample, D rows among them that are drawn from, P rows that report log-probabilities, V vocabulary,
C tokens reported.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops import sampling
from services.engine.state import DeviceState, Parameters, Selection, Wants, on_device


@dataclass(frozen=True, slots=True)
class Reported:
    """Log-probabilities of the rows that want them."""

    rows: Seq[int]
    """Which of the R."""
    counts: Seq[int]
    """How many of the likeliest each of them wants."""
    chosen_P: Tensor
    top_PC: Tensor
    """Likeliest first; as many as the row that wants most."""
    top_ids_PC: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled."""

    token_ids_R: Tensor
    """int64."""
    peaks_R: Tensor
    """The largest logit of each row. Where it is not finite, the logits held NaN or infinity, or nothing but minus
    infinity, and the token means nothing."""
    reported: Reported | None


class Sampler:
    """Samples for the slots of one `DeviceState`."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state

    def __call__(self, logits_RV: Tensor, selection: Selection) -> Sampled:
        """The next token of each selected slot. Leaves anything in the logits, which are float32."""
        wanted = self._state.sampling.wanted_by(selection.slots)
        raw_PV = self._kept_for_report(logits_RV, selection) if Wants.LOGPROBS in wanted else None
        self._edit(logits_RV, selection, wanted)
        token_ids_R, peaks_R = sampling.argmax(logits_RV)
        if Wants.DRAW in wanted:
            token_ids_R = self._draw(logits_RV, token_ids_R, selection, wanted)
        reported = self._report(raw_PV, token_ids_R, selection) if raw_PV is not None else None
        return Sampled(token_ids_R, peaks_R, reported)

    def _edit(self, logits_RV: Tensor, selection: Selection, wanted: Wants) -> None:
        for want, edit in EDITS.items():
            if want in wanted:
                for row in self._rows_wanting(want, selection):
                    edit(logits_RV[row], self._state, selection.slots[row], selection.positions[row])

    def _draw(self, logits_RV: Tensor, likeliest_R: Tensor, selection: Selection, wanted: Wants) -> Tensor:
        """The tokens of all rows; those that are not drawn from have their likeliest."""
        rows = self._rows_wanting(Wants.DRAW, selection)
        if len(rows) == len(selection):
            return self._draw_all(logits_RV, selection, wanted)
        rows_D = on_device(rows, logits_RV.device)
        drawn_D = self._draw_all(logits_RV[rows_D], selection.take(rows, rows_D), wanted)
        return likeliest_R.index_copy(0, rows_D, drawn_D)

    def _draw_all(self, logits_DV: Tensor, selection: Selection, wanted: Wants) -> Tensor:
        parameters = self._state.sampling.parameters(selection)
        p_DV = sampling.probabilities(logits_DV, parameters.temperature_R if Wants.TEMPERATURE in wanted else None)
        for want, shape in SHAPES.items():
            if want in wanted:
                shape(p_DV, parameters)
        return sampling.draw(
            p_DV, seed_R2=parameters.seed_R2, position_R=selection.positions_R, choice_R=parameters.choice_R
        )

    def _kept_for_report(self, logits_RV: Tensor, selection: Selection) -> Tensor:
        """A copy of the rows that report, as the model gave them."""
        rows = self._rows_wanting(Wants.LOGPROBS, selection)
        return logits_RV[on_device(rows, logits_RV.device)]

    def _report(self, raw_PV: Tensor, token_ids_R: Tensor, selection: Selection) -> Reported:
        rows = self._rows_wanting(Wants.LOGPROBS, selection)
        counts = [self._state.sampling.params(selection.slots[row]).logprobs or 0 for row in rows]
        chosen_P = token_ids_R[on_device(rows, token_ids_R.device)]
        return Reported(rows, counts, *sampling.log_probabilities(raw_PV, chosen_P, most=max(counts)))

    def _rows_wanting(self, want: Wants, selection: Selection) -> list[int]:
        return [row for row, slot in enumerate(selection.slots) if want in self._state.sampling.wants(slot)]


class RowByRow(Sampler):
    """Samples each row by itself wherever a row wants more than its likeliest token: how a GPU adds up the probabilities
    of a row follows from how many rows there are. The likeliest token does not."""

    def __call__(self, logits_RV: Tensor, selection: Selection) -> Sampled:
        if not self._state.sampling.wanted_by(selection.slots):
            return super().__call__(logits_RV, selection)
        found = []
        for row in range(len(selection)):
            one = selection.take([row], on_device([row], logits_RV.device))
            found.append(super().__call__(logits_RV[row : row + 1], one))
        whole = joined(found)
        assert whole is not None
        return whole


def joined(parts: Seq[Sampled]) -> Sampled | None:
    """What several samplers found, one after the other; None where there is none."""
    if not parts:
        return None
    firsts = [0, *accumulate(len(part.token_ids_R) for part in parts)]
    reports = [(first, part.reported) for first, part in zip(firsts, parts, strict=False) if part.reported is not None]
    return Sampled(
        torch.cat([part.token_ids_R for part in parts]),
        torch.cat([part.peaks_R for part in parts]),
        _joined_reports(reports) if reports else None,
    )


def _joined_reports(parts: Seq[tuple[int, Reported]]) -> Reported:
    """Each with the row that its first one is. What a row does not want is filled up with zeros."""
    most = max(part.top_PC.shape[1] for _, part in parts)
    return Reported(
        [first + row for first, part in parts for row in part.rows],
        [count for _, part in parts for count in part.counts],
        torch.cat([part.chosen_P for _, part in parts]),
        torch.cat([F.pad(part.top_PC, (0, most - part.top_PC.shape[1])) for _, part in parts]),
        torch.cat([F.pad(part.top_ids_PC, (0, most - part.top_ids_PC.shape[1])) for _, part in parts]),
    )


def _penalize(logits_V: Tensor, state: DeviceState, slot: int, position: int) -> None:
    params = state.sampling.params(slot)
    sampling.penalize(
        logits_V,
        state.history(slot, position),
        num_prompt=state.sampling.num_prompt(slot),
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )


def _add_bias(logits_V: Tensor, state: DeviceState, slot: int, position: int) -> None:
    ids, values = state.sampling.bias(slot)
    logits_V.index_add_(0, ids, values)


def _forbid_stops(logits_V: Tensor, state: DeviceState, slot: int, position: int) -> None:
    num_output = position - state.sampling.num_prompt(slot)
    # The sequence may end with the token that makes it `min_tokens` long.
    if num_output + 1 < state.sampling.min_tokens(slot):
        logits_V.index_fill_(0, state.sampling.stop_ids(slot), -torch.inf)


EDITS: dict[Wants, Callable[[Tensor, DeviceState, int, int], None]] = {
    Wants.PENALTIES: _penalize,
    Wants.BIAS: _add_bias,
    Wants.MIN_TOKENS: _forbid_stops,
}
"""What changes the logits of one row, in place, given its slot and the position of the token to sample, in order."""

SHAPES: dict[Wants, Callable[[Tensor, Parameters], Tensor]] = {
    Wants.TOP_K: lambda p_DV, parameters: sampling.keep_top_k(p_DV, parameters.top_k_R, most=parameters.most_top_k),
    Wants.TOP_P: lambda p_DV, parameters: sampling.keep_top_p(p_DV, parameters.top_p_R),
    Wants.MIN_P: lambda p_DV, parameters: sampling.keep_min_p(p_DV, parameters.min_p_R),
}
"""What drops unlikely tokens of all rows, in place, in order."""
