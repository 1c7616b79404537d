"""What one step runs: the scheduler's answer to the runner.

The device keeps the state of running sequences in numbered **slots**: the known tokens, the block table and the sampling
parameters. A `Step` says what changes in the slots (the delta) and which tokens to compute. It is plain data and refers
to nothing: the same step may be computed in this process or in several others.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from services.engine.sequence import SamplingParams, StopRules

if TYPE_CHECKING:
    from services.engine.sequence import Sequence, TokenLogprobs


class Work(NamedTuple):
    """Compute the known tokens [start, start + count) of one slot; where that reaches the last known token, sample the
    next one."""

    slot: int
    start: int
    # A tuple's own `count` searches it; nobody searches a work.
    count: int  # type: ignore[assignment]
    samples: bool
    """Whether the last of these tokens is the last known one."""

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot: all that the device is told of it."""

    slot: int
    token_ids: Seq[int]
    """All that are known."""
    num_prompt: int
    """How many of them are the prompt."""
    choice: int
    sampling: SamplingParams
    stop: StopRules

    @classmethod
    def of(cls, sequence: Sequence, slot: int) -> Admission:
        """The sequence as it stands now."""
        return cls(
            slot,
            sequence.token_ids(0, sequence.num_known),
            num_prompt=len(sequence.prompt_ids),
            choice=sequence.choice,
            sampling=sequence.sampling,
            stop=sequence.stop,
        )


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
    economical: bool = False
    """Whether the smaller copy of the weights computes it."""

    @property
    def num_tokens(self) -> int:
        return sum(work.count for work in self.works)

    @property
    def num_decodes(self) -> int:
        """How many of the works, from the first on, compute exactly one token."""
        return next((i for i, work in enumerate(self.works) if work.count != 1), len(self.works))

    @property
    def is_decode(self) -> bool:
        """Whether every work computes one token and samples the next."""
        return self.num_decodes == len(self.works) and all(work.samples for work in self.works)

    def __reduce__(self) -> tuple[Callable[..., Step], tuple[object, ...]]:
        # Pickled for every step of every rank: one row of numbers is a twentieth of the time of so many objects.
        works = array("i", chain.from_iterable(self.works))
        return _step_of, (self.number, works, self.admitted, self.grown, self.released, self.economical)


def _step_of(number: int, works: array[int], *rest: object) -> Step:
    each = iter(works)
    return Step(number, tuple(map(Work, each, each, each, map(bool, each))), *rest)  # type: ignore[arg-type]


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
