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

WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3, "seed": 2**64 - 1},
    {"temperature": 1.7, "top_k": 3, "seed": 9},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.8},
    {"temperature": 0.9, "top_p": 0.5, "min_p": 0.1, "choice": 5},
    {"temperature": 1.0, "min_p": 0.01, "seed": 1 << 40},
    {"repetition_penalty": 1.4},
    {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"logit_bias": ((7, 5.0), (599, -100.0))},
    {"temperature": 1.0, "logit_bias": ((7, 9.0),), "logprobs": 3},
    {"logprobs": 0},
    {"stop": StopRules(100, min_tokens=50, stop_token_ids=frozenset({3, 4}))},
]
"""What a sequence may ask of the sampler, of a vocabulary of 600 tokens or more."""


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
