"""What the sequences in the slots ask of the sampler, in numbers for the device and in words for the host."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from services.engine.batch import Admission
from services.engine.ops.parameters import Floats, Integers, Parameters
from services.engine.sequence import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams, StopRules
from services.engine.transfers import on_device


class Wants(enum.Flag):
    """What a sequence asks of the sampler beyond its likeliest token."""

    PENALTIES = enum.auto()
    """Its own tokens made less likely."""
    BIAS = enum.auto()
    """Something added to some logits."""
    MIN_TOKENS = enum.auto()
    """No stop token for a while."""
    DRAW = enum.auto()
    """A token drawn from the distribution."""
    TEMPERATURE = enum.auto()
    """One other than 1."""
    TOP_K = enum.auto()
    TOP_P = enum.auto()
    MIN_P = enum.auto()
    LOGPROBS = enum.auto()
    """Log-probabilities reported."""


COLDEST = 1e-5
"""Temperatures below are greedy: the logits they divide would leave float32."""


EDITED = Wants.PENALTIES | Wants.BIAS | Wants.MIN_TOKENS
"""What changes logits."""

SHAPED = Wants.TOP_K | Wants.TOP_P | Wants.MIN_P
"""What drops unlikely tokens."""


class SamplingState:
    """The sampling parameters of every slot."""

    def __init__(self, num_slots: int, *, device: torch.device) -> None:
        self._device = device
        self.parameters = Parameters.zeros(num_slots, num_entries=MAX_LOGIT_BIAS + MAX_STOP_TOKENS, device=device)
        self._admissions: list[Admission | None] = [None] * num_slots
        self._wants = [Wants(0)] * num_slots

    def admit(self, admission: Admission) -> None:
        """The slot's sequence asks for this."""
        slot = admission.slot
        self._admissions[slot] = admission
        self._wants[slot] = _wants(admission.sampling, admission.stop)
        floats, integers = _numbers(admission, self._wants[slot])
        self.parameters.floats_FS[:, slot] = on_device(floats, self._device, dtype=torch.float32)
        self.parameters.integers_IS[:, slot] = on_device(integers, self._device)
        if entries := _additions(admission, self._wants[slot]):
            ids, additions = zip(*entries, strict=True)
            self.parameters.ids_SE[slot, : len(ids)] = on_device(ids, self._device, dtype=torch.int32)
            self.parameters.additions_SE[slot, : len(ids)] = on_device(additions, self._device, dtype=torch.float32)

    def release(self, slot: int) -> None:
        """The slot's sequence left."""
        self._admissions[slot] = None

    def wants(self, slot: int) -> Wants:
        """What this slot asks for."""
        return self._wants[slot]

    def wanted_by(self, slots: Seq[int]) -> Wants:
        """What any of the slots asks for."""
        return reduce(or_, {self._wants[slot] for slot in slots}, Wants(0))

    def params(self, slot: int) -> SamplingParams:
        """What this slot's sequence asks for, in its own words."""
        return self._admission(slot).sampling

    def num_tops(self, slots: Seq[int]) -> list[int | None]:
        """How many of the likeliest tokens each of the slots wants to hear of, beside the chosen one; None where it wants to hear of
        none."""
        return [self.params(slot).logprobs for slot in slots]

    def num_prompt(self, slot: int) -> int:
        """Tokens of its prompt."""
        return self._admission(slot).num_prompt

    def min_tokens(self, slot: int) -> int:
        """Tokens before which it must not end."""
        return self._admission(slot).stop.min_tokens

    def bias(self, slot: int) -> tuple[Tensor, Tensor]:
        """Token ids, and what is added to their logits."""
        entries = slice(len(self.params(slot).logit_bias))
        return self.parameters.ids_SE[slot, entries], self.parameters.additions_SE[slot, entries]

    def stop_ids(self, slot: int) -> Tensor:
        """The tokens that it must not end with."""
        first = len(self.params(slot).logit_bias)
        return self.parameters.ids_SE[slot, first : first + len(self._admission(slot).stop.stop_token_ids)]

    def _admission(self, slot: int) -> Admission:
        admission = self._admissions[slot]
        assert admission is not None, f"slot {slot} holds no sequence"
        return admission


def _numbers(admission: Admission, wants: Wants) -> tuple[Floats[float], Integers[int]]:
    params, stop = admission.sampling, admission.stop
    floats = Floats(
        temperature=params.temperature if Wants.DRAW in wants else 0.0,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )
    integers = Integers(
        top_k=params.top_k,
        seed_low=params.seed & 0xFFFFFFFF,
        seed_high=params.seed >> 32,
        choice=admission.choice,
        num_prompt=admission.num_prompt,
        num_biased=len(params.logit_bias),
        num_stops=len(stop.stop_token_ids) if Wants.MIN_TOKENS in wants else 0,
        min_length=admission.num_prompt + stop.min_tokens,
        edited=int(bool(wants & EDITED)),
        shaped=int(bool(wants & SHAPED)),
        reported=int(Wants.LOGPROBS in wants),
        num_top=params.logprobs or 0,
    )
    return floats, integers


def _additions(admission: Admission, wants: Wants) -> list[tuple[int, float]]:
    """Tokens, and what is added to their logits: always, then as long as the sequence must not end."""
    stops = sorted(admission.stop.stop_token_ids) if Wants.MIN_TOKENS in wants else []
    return [*admission.sampling.logit_bias, *((token, -torch.inf) for token in stops)]


def _wants(params: SamplingParams, stop: StopRules) -> Wants:
    draws = params.temperature >= COLDEST
    asked = {
        Wants.PENALTIES: (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0),
        Wants.BIAS: bool(params.logit_bias),
        Wants.MIN_TOKENS: stop.min_tokens > 0 and bool(stop.stop_token_ids),
        Wants.DRAW: draws,
        Wants.TEMPERATURE: draws and params.temperature != 1,
        Wants.TOP_K: draws and params.top_k > 0,
        Wants.TOP_P: draws and params.top_p < 1,
        Wants.MIN_P: draws and params.min_p > 0,
        Wants.LOGPROBS: params.logprobs is not None,
    }
    return reduce(or_, (want for want, is_asked in asked.items() if is_asked), Wants(0))
