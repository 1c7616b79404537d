"""The sampler of a GPU: `TorchSampler` by kernels, for which a row is computed alike whatever rows there are beside it.

Two ways, both of which can be captured: rows that take their likeliest token, or draw one from all of them by a temperature,
read their logits once. Whatever else one asks for takes some kernels more, in which the rows that do not ask for it have nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from services.engine.ops.kernels.candidates import groups
from services.engine.ops.kernels.draw import draw
from services.engine.ops.kernels.edits import edit
from services.engine.ops.kernels.floors import floors
from services.engine.ops.kernels.logprobs import log_probabilities
from services.engine.sampler import Reported, Sampled
from services.engine.sampling_state import Wants
from services.engine.sequence import MAX_LOGPROBS
from services.engine.state import DeviceState, Selection

PLAIN = Wants.DRAW | Wants.TEMPERATURE
"""What the first way knows."""


class KernelSampler:
    """A `Sampler`."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state

    def __call__(self, logits_RV: Tensor, selection: Selection) -> Sampled:
        """As `Sampler`."""
        if self.is_plain(selection.slots):
            return self.plain(logits_RV, selection)
        sampled = self.whole(logits_RV, torch.empty_like(logits_RV), selection)
        return self.of_slots(sampled, selection.slots)

    def is_plain(self, slots: Seq[int]) -> bool:
        """Whether these slots are content with the first way."""
        return not self._state.sampling.wanted_by(slots) & ~PLAIN

    def plain(self, logits_RV: Tensor, selection: Selection) -> Sampled:
        """The first way. Leaves the logits as they are."""
        state = self._state
        found = draw(logits_RV, state.sampling.parameters, selection.slots_R, selection.positions_R, state.tokens)
        return Sampled(*found, None)

    def whole(self, logits_RV: Tensor, before_RV: Tensor, selection: Selection) -> Sampled:
        """The second way. Overwrites `before_RV`, which is as large as the logits. Whom the rows belong to need not be known to
        the host: log-probabilities are there for all that want them."""
        parameters, slots_R, tokens = self._state.sampling.parameters, selection.slots_R, self._state.tokens
        numbers = parameters.integers
        unedited = groups(logits_RV, slots_R, numbers.reported)
        edit(logits_RV, before_RV, parameters, slots_R, selection.positions_R, tokens)
        hot = groups(logits_RV, slots_R, numbers.shaped, parameters.floats.temperature)
        floors_R = floors(logits_RV, hot, parameters, slots_R)
        token_ids_R, peaks_R = draw(logits_RV, parameters, slots_R, selection.positions_R, tokens, floors_R=floors_R)
        told = log_probabilities(logits_RV, before_RV, token_ids_R, unedited, parameters, slots_R, most=MAX_LOGPROBS)
        return Sampled(token_ids_R, peaks_R, Reported([], *told))

    def of_slots(self, sampled: Sampled, slots: Seq[int]) -> Sampled:
        """Of what either way found, the first rows, which are these slots'."""
        rows, told = slice(len(slots)), None
        if (found := sampled.reported) is not None and Wants.LOGPROBS in self._state.sampling.wanted_by(slots):
            counts = self._state.sampling.num_tops(slots)
            told = Reported(counts, found.chosen_R[rows], found.top_RC[rows], found.top_ids_RC[rows])
        return Sampled(sampled.token_ids_R[rows], sampled.peaks_R[rows], told)
