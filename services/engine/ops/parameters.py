"""What running sequences ask of the sampler: a number for each slot, where kernels find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Floats(NamedTuple, Generic[T]):
    """Of one slot, or as a tensor of all of them."""

    temperature: T
    """0 where the likeliest token is taken."""
    top_p: T
    min_p: T
    repetition: T
    """Divides positive, multiplies negative logits of tokens that occurred."""
    presence: T
    """Subtracted from the logits of tokens of the output."""
    frequency: T
    """The same, once for each time a token occurred."""


class Integers(NamedTuple, Generic[T]):
    """Of one slot, or as a tensor of all of them."""

    top_k: T
    """0 keeps all."""
    seed_low: T
    seed_high: T
    """32 bits each."""
    choice: T
    num_prompt: T
    """Tokens of the prompt."""
    num_biased: T
    """Entries of the slot's list that always count."""
    num_stops: T
    """Entries behind them, which count until the sequence is nearly `min_length` long."""
    min_length: T
    """Prompt and output: the sequence must not end before."""
    edited: T
    """Whether some of its logits are changed before a token is chosen."""
    shaped: T
    """Whether unlikely tokens are dropped before one is drawn."""
    reported: T
    """Whether log-probabilities are wanted."""
    num_top: T
    """How many of the likeliest are reported."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Of S slots. Floats are float32, integers int64."""

    floats_FS: Tensor
    integers_IS: Tensor
    """A row for each of the names in `Floats` and `Integers`."""
    ids_SE: Tensor
    """int32: tokens whose logits something is added to,"""
    additions_SE: Tensor
    """float32: and what. Minus infinity for those that would end a sequence too early."""

    @classmethod
    def zeros(cls, num_slots: int, *, num_entries: int, device: torch.device) -> Parameters:
        """Of slots that ask for nothing, with room for `num_entries` additions each. Each name's numbers begin where wide loads may,
        so that kernels are compiled once for any number of slots."""
        width = -(-num_slots // 4) * 4
        return cls(
            torch.zeros((len(Floats._fields), width), dtype=torch.float32, device=device)[:, :num_slots],
            torch.zeros((len(Integers._fields), width), dtype=torch.int64, device=device)[:, :num_slots],
            torch.zeros((num_slots, num_entries), dtype=torch.int32, device=device),
            torch.zeros((num_slots, num_entries), dtype=torch.float32, device=device),
        )

    @property
    def floats(self) -> Floats[Tensor]:
        return Floats(*self.floats_FS.unbind(0))

    @property
    def integers(self) -> Integers[Tensor]:
        return Integers(*self.integers_IS.unbind(0))

    def take(self, slots_R: Tensor) -> tuple[Floats[Tensor], Integers[Tensor]]:
        """The numbers of these slots, a row for each."""
        floats = self.floats_FS.index_select(1, slots_R)
        return Floats(*floats.unbind(0)), Integers(*self.integers_IS.index_select(1, slots_R).unbind(0))
