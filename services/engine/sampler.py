"""From the logits of a step to its tokens: a list of small steps, each skipped where no row wants it.

    penalties, bias, min_tokens     change some logits of a row (`EDITS`)
    temperature, top-k, top-p, min-p     shape the distribution of the rows that are drawn from (`SHAPES`)
    draw     a token by the row's own noise; all other rows take the likeliest

Reported log-probabilities are of the model's own distribution, before any of it. Where every row is greedy and nothing
else is asked for, a step is one arg max. A GPU does the same by kernels (`kernel_sampler`), for which this is the
specification.

Shapes: R rows to sample, D rows among them that are drawn from, P rows that report log-probabilities, V vocabulary,
C tokens reported.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops import sampling
from services.engine.ops.parameters import Floats, Integers
from services.engine.sampling_state import Wants
from services.engine.state import DeviceState, Selection
from services.engine.transfers import on_device


@dataclass(frozen=True, slots=True)
class Reported:
    """Log-probabilities of the rows that want them; what stands in other rows means nothing."""

    counts: Seq[int | None]
    """How many of the likeliest each row is told, beside the chosen one; None where it wants to hear of none."""
    chosen_R: Tensor
    top_RC: Tensor
    """Likeliest first; as many as the row that wants most, or more."""
    top_ids_RC: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled."""

    token_ids_R: Tensor
    """int64."""
    peaks_R: Tensor
    """The largest logit of each row. Where it is not finite, the logits held NaN or infinity, or nothing but minus
    infinity, and the token means nothing."""
    reported: Reported | None


class Sampler(Protocol):
    """Samples for the slots of one `DeviceState`."""

    def __call__(self, logits_RV: Tensor, selection: Selection) -> Sampled:
        """The next token of each selected slot, which is known to the slot then. Leaves anything in the logits, which are
        float32."""
        ...


def sampler_for(state: DeviceState) -> Sampler:
    """The sampler of the state's device."""
    if state.device.type != "cuda":
        return TorchSampler(state)
    from services.engine.kernel_sampler import KernelSampler  # needs Triton, which a CPU does without

    return KernelSampler(state)


class TorchSampler:
    """A `Sampler`, operation by operation."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state

    def __call__(self, logits_RV: Tensor, selection: Selection) -> Sampled:
        """As `Sampler`."""
        wanted = self._state.sampling.wanted_by(selection.slots)
        raw_PV = self._kept_for_report(logits_RV, selection) if Wants.LOGPROBS in wanted else None
        self._edit(logits_RV, selection, wanted)
        token_ids_R, peaks_R = sampling.argmax(logits_RV)
        if Wants.DRAW in wanted:
            token_ids_R = self._draw(logits_RV, token_ids_R, selection, wanted)
        reported = self._report(raw_PV, token_ids_R, selection) if raw_PV is not None else None
        self._state.append(selection, token_ids_R)
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
        floats, integers = self._state.sampling.parameters.take(selection.slots_R)
        p_DV = sampling.probabilities(logits_DV, floats.temperature if Wants.TEMPERATURE in wanted else None)
        for want, shape in SHAPES.items():
            if want in wanted:
                shape(p_DV, floats, integers)
        seed_R2 = torch.stack((integers.seed_low, integers.seed_high), dim=1)
        return sampling.draw(p_DV, seed_R2=seed_R2, position_R=selection.positions_R, choice_R=integers.choice)

    def _kept_for_report(self, logits_RV: Tensor, selection: Selection) -> Tensor:
        """A copy of the rows that report, as the model gave them."""
        rows = self._rows_wanting(Wants.LOGPROBS, selection)
        return logits_RV[on_device(rows, logits_RV.device)]

    def _report(self, raw_PV: Tensor, token_ids_R: Tensor, selection: Selection) -> Reported:
        counts = self._state.sampling.num_tops(selection.slots)
        rows_P = on_device(self._rows_wanting(Wants.LOGPROBS, selection), token_ids_R.device)
        most = max(count for count in counts if count is not None)
        found = sampling.log_probabilities(raw_PV, token_ids_R[rows_P], most=most)
        return Reported(counts, *(_spread(each, rows_P, len(selection)) for each in found))

    def _rows_wanting(self, want: Wants, selection: Selection) -> list[int]:
        return [row for row, slot in enumerate(selection.slots) if want in self._state.sampling.wants(slot)]


def joined(parts: Seq[Sampled]) -> Sampled | None:
    """What several samplers found, one after the other; None where there is none."""
    if not parts:
        return None
    reports = [part.reported or _nothing_reported(len(part.token_ids_R)) for part in parts]
    return Sampled(
        torch.cat([part.token_ids_R for part in parts]),
        torch.cat([part.peaks_R for part in parts]),
        _joined_reports(reports) if any(part.reported is not None for part in parts) else None,
    )


def _nothing_reported(num_rows: int) -> Reported:
    none_R0 = torch.zeros(num_rows, 0)
    return Reported([None] * num_rows, torch.zeros(num_rows), none_R0, none_R0.long())


def _joined_reports(reports: Seq[Reported]) -> Reported:
    most = max(report.top_RC.shape[1] for report in reports)
    return Reported(
        [count for report in reports for count in report.counts],
        torch.cat([report.chosen_R for report in reports]),
        torch.cat([F.pad(report.top_RC, (0, most - report.top_RC.shape[1])) for report in reports]),
        torch.cat([F.pad(report.top_ids_RC, (0, most - report.top_ids_RC.shape[1])) for report in reports]),
    )


def _spread(each_P: Tensor, rows_P: Tensor, num_rows: int) -> Tensor:
    """The same where P are rows among R."""
    return each_P.new_zeros((num_rows, *each_P.shape[1:])).index_copy(0, rows_P, each_P)


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
        logits_V.index_fill_(0, state.sampling.stop_ids(slot).long(), -torch.inf)


EDITS: dict[Wants, Callable[[Tensor, DeviceState, int, int], None]] = {
    Wants.PENALTIES: _penalize,
    Wants.BIAS: _add_bias,
    Wants.MIN_TOKENS: _forbid_stops,
}
"""What changes the logits of one row, in place, given its slot and the position of the token to sample, in order."""

SHAPES: dict[Wants, Callable[[Tensor, Floats[Tensor], Integers[Tensor]], Tensor]] = {
    Wants.TOP_K: lambda p_DV, _, integers: sampling.keep_top_k(p_DV, integers.top_k, most=int(integers.top_k.max())),
    Wants.TOP_P: lambda p_DV, floats, _: sampling.keep_top_p(p_DV, floats.top_p),
    Wants.MIN_P: lambda p_DV, floats, _: sampling.keep_min_p(p_DV, floats.min_p),
}
"""What drops unlikely tokens of all rows, in place, in order."""
