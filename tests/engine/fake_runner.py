"""A runner with a model so small that its cache can be checked to the last entry.

What the model computes at a position is a digest of all tokens up to there, made from the entry of the position before,
which it reads through the slot's block table as attention would. A wrong block, a lost write or a stale entry gives
another token, or fails at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from services.engine.batch import Admission, Step, StepResult, Work
from services.engine.blocks import BlockPool
from services.engine.sequence import Sequence, StopRules

VOCABULARY = 23
EOS = 0


def digest(before: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), before)


def next_token(entry: int, choice: int, taste: int = 0) -> int:
    return zlib.crc32(bytes([choice, taste]) if taste else bytes([choice]), entry) % VOCABULARY


def possible_output(prompt_ids: Seq[int], output_ids: Seq[int], tastes: Seq[int], choice: int = 0) -> bool:
    """Whether each token is one that a runner of one of these tastes adds to those before it."""
    entry = 0
    for token_id in prompt_ids:
        entry = digest(entry, token_id)
    for token_id in output_ids:
        if token_id not in {next_token(entry, choice, taste) for taste in tastes}:
            return False
        entry = digest(entry, token_id)
    return True


def expected_output(prompt_ids: Seq[int], stop: StopRules, choice: int = 0, taste: int = 0) -> list[int]:
    """What the model answers where nothing interferes."""
    entry, output = 0, []
    for token_id in prompt_ids:
        entry = digest(entry, token_id)
    while True:
        token_id = next_token(entry, choice, taste)
        output.append(token_id)
        if len(output) == stop.max_tokens or (token_id in stop.stop_token_ids and len(output) >= stop.min_tokens):
            return output
        entry = digest(entry, token_id)


@dataclass
class Slot:
    """What the device knows of one running sequence."""

    admission: Admission
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Launched:
    step: Step
    sampled: tuple[int, ...]
    failed: frozenset[int]
    blocks: frozenset[int]
    """All blocks that the step reads or writes."""


class FakeRunner:
    """Runs steps in the order of their launches, as a device does."""

    def __init__(self, pool: BlockPool, taste: int = 0) -> None:
        """Runners of different tastes continue the same text differently, as engines do whose sums differ."""
        self.pool = pool
        self.taste = taste
        self.slots: dict[int, Slot] = {}
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        """(block, offset) → (position, digest)."""
        self.sick: Sequence | None = None
        """A sequence whose logits are no numbers."""

    def launch(self, step: Step) -> Launched:
        self._apply(step)
        sampled = [token_id for work in step.works if (token_id := self._run(work)) is not None]
        blocks = frozenset(block for work in step.works for block in self.slots[work.slot].blocks)
        return Launched(step, tuple(sampled), self._failed(step), blocks)

    def collect(self, launched: Launched) -> StepResult:
        return StepResult(launched.step, launched.sampled, (None,) * len(launched.sampled), launched.failed)

    def stop(self) -> None:
        pass

    def _failed(self, step: Step) -> frozenset[int]:
        sampling = [work.slot for work in step.works if work.samples]
        return frozenset(
            index for index, slot in enumerate(sampling) if self.sick is not None and slot == self.sick.slot
        )

    def _apply(self, step: Step) -> None:
        for slot in step.released:
            del self.slots[slot]
        for admission in step.admitted:
            assert admission.slot not in self.slots, "a slot is admitted twice"
            self.slots[admission.slot] = Slot(admission, list(admission.token_ids))
        for growth in step.grown:
            assert growth.index == len(self.slots[growth.slot].blocks), "a hole in a block table"
            self.slots[growth.slot].blocks.extend(growth.blocks)

    def _run(self, work: Work) -> int | None:
        slot = self.slots[work.slot]
        entry = self._check_prefix(slot, work.start)
        for position in range(work.start, work.end):
            entry = digest(entry, slot.token_ids[position])
            self._write(slot, position, entry)
        if not work.samples:
            return None
        assert work.end == len(slot.token_ids), "a row is sampled that is not the last"
        slot.token_ids.append(next_token(entry, slot.admission.choice, self.taste))
        return slot.token_ids[-1]

    def _check_prefix(self, slot: Slot, end: int) -> int:
        entry = 0
        for position in range(end):
            entry = digest(entry, slot.token_ids[position])
            assert self.cache[self._place(slot, position)] == (position, entry), f"wrong keys at {position}"
        return entry

    def _write(self, slot: Slot, position: int, entry: int) -> None:
        block, offset = self._place(slot, position)
        assert self.pool.num_references(block) == 1, "a block is written that others hold"
        assert self.pool.hash_of(block) is None, "a block is written whose hash is known"
        self.cache[block, offset] = (position, entry)

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.blocks[position // self.pool.block_size], position % self.pool.block_size
