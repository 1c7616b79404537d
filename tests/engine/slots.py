"""Sequences put into slots, and one step that samples for each of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from services.engine.batch import Admission, Growth, Step, Work
from services.engine.sampler import Sampled, TorchSampler
from services.engine.sequence import SamplingParams, Sequence, StopRules
from services.engine.state import DeviceState, Selection

BLOCK_SIZE = 16


def sequence(
    prompt_ids: Seq[int] = (1, 2, 3), output_ids: Seq[int] = (), *, choice: int = 0, stop: StopRules | None = None,
    **sampling: Any,
) -> Sequence:  # fmt: skip
    """A sequence that stands after `output_ids`; greedy unless a temperature is given."""
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    known = list(output_ids)
    return Sequence("r", choice, list(prompt_ids), params, stop or StopRules(max_tokens=100), output_ids=known)


def admitted(*sequences: Sequence, max_len: int = 1024, device: str = "cpu") -> tuple[DeviceState, Selection]:
    """The slots that hold these sequences, and the selection of a step that samples the next token of each."""
    state = DeviceState(num_slots=len(sequences), max_len=max_len, block_size=BLOCK_SIZE, device=device)
    works = tuple(Work(slot, each.num_known - 1, 1, True) for slot, each in enumerate(sequences))
    admissions = tuple(Admission.of(each, slot) for slot, each in enumerate(sequences))
    blocks = tuple(range(-(-max_len // BLOCK_SIZE)))
    grown = tuple(Growth(slot, 0, blocks) for slot in range(len(sequences)))
    return state, state.apply(Step(1, works, admissions, grown)).selection


def sample(logits_RV: Tensor, *sequences: Sequence) -> Sampled:
    """What the sampler makes of these logits."""
    state, selection = admitted(*sequences)
    with torch.inference_mode():
        return TorchSampler(state)(logits_RV.clone(), selection)


def tokens(logits_RV: Tensor, *sequences: Sequence) -> list[int]:
    """The sampled tokens alone."""
    sampled = sample(logits_RV, *sequences)
    assert bool(sampled.peaks_R.isfinite().all())
    ids: list[int] = sampled.token_ids_R.tolist()
    return ids
