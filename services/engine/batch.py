"""What one step runs: the scheduler's answer to the runner.

The device keeps the state of running sequences in numbered **slots**: the known tokens, the block table and the sampling
parameters. A `Step` says what changes in the slots (the delta) and which tokens to compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.engine.sequence import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the known tokens [start, start + count) of one sequence; where that reaches the last known token, sample
    the next one."""

    sequence: Sequence
    slot: int
    start: int
    count: int
    samples: bool
    """Whether the last of these tokens is the last known one."""

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot: its known tokens and parameters go to the device."""

    sequence: Sequence
    slot: int


@dataclass(frozen=True, slots=True)
class Growth:
    """Blocks are appended to a slot's block table, from entry `index` on."""

    slot: int
    index: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Releases come first, then admissions, then growth, then the work, decodes (count 1) before the rest."""

    number: int
    """Rises by one with every step."""
    works: tuple[Work, ...]
    admitted: tuple[Admission, ...] = ()
    grown: tuple[Growth, ...] = ()
    released: tuple[int, ...] = ()
    """Slots."""

    @property
    def num_tokens(self) -> int:
        return sum(work.count for work in self.works)

    @property
    def num_decodes(self) -> int:
        """How many of the works, from the first on, compute exactly one token."""
        return next((i for i, work in enumerate(self.works) if work.count != 1), len(self.works))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled."""

    step: Step
    token_ids: tuple[int, ...]
    """One for each work that samples, in the order of the works."""
    logprobs: tuple[TokenLogprobs | None, ...]
    """The same, None where the sequence did not ask for them."""
    failed: frozenset[int] = frozenset()
    """Indices of `token_ids` that mean nothing, for the model's logits there were not numbers: such a sequence cannot
    go on."""
