"""The sequences that run: who holds which slot and which blocks, and what the device is yet to be told of it.

A block is given back only when the last step that uses it was committed. The device hears of a slot in the order
released, admitted, grown; a slot it never heard of is never released.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from services.engine.batch import Admission, Growth, Step, Work
from services.engine.blocks import BlockPool
from services.engine.sequence import Phase, Sequence
from services.engine.totals import Totals
from services.engine.waiting import Line, Waiting


class Running(Line):
    """Who is in this line holds a slot, and whatever blocks it was given."""

    def __init__(self, pool: BlockPool, waiting: Waiting, totals: Totals, *, max_sequences: int) -> None:
        super().__init__()
        self._pool = pool
        self._waiting = waiting
        self._totals = totals
        self._free_slots = list(range(max_sequences))
        heapify(self._free_slots)  # the lowest first, so that slots in use lie close together
        self._returning: list[tuple[int, list[int]]] = []  # blocks, and the step after which they are nobody's
        self._delta = _Delta()

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def has_blocks_returning(self) -> bool:
        """Whether sequences left whose blocks a step in flight still uses."""
        return bool(self._returning)

    @property
    def num_batch(self) -> int:
        return sum(not sequence.interactive for sequence in self)

    def num_prefill_tokens(self) -> dict[bool, int]:
        """By `interactive`, the tokens of prompts that are yet to be computed."""
        tokens = {True: 0, False: 0}
        for sequence in self:
            if not sequence.has_all_planned and sequence.num_remaining > 1:
                tokens[sequence.interactive] += sequence.num_remaining
        return tokens

    def add(self, sequence: Sequence) -> None:
        """Gives it a slot."""
        super().add(sequence)
        sequence.phase = Phase.RUNNING
        sequence.slot = heappop(self._free_slots)
        self._delta.admit(sequence.slot, sequence)

    def share(self, sequence: Sequence, blocks: list[int]) -> None:
        """Gives it blocks that are held already."""
        self._pool.share(blocks)
        self._append(sequence, blocks)

    def allocate(self, sequence: Sequence, count: int) -> None:
        """Gives it as many of `count` blocks as are available."""
        self._append(sequence, self._pool.allocate(min(count, self._pool.num_available)))

    def _append(self, sequence: Sequence, blocks: list[int]) -> None:
        assert sequence.slot is not None
        if blocks:
            self._delta.grow(sequence.slot, len(sequence.blocks), blocks)
            sequence.blocks.extend(blocks)

    def remove(self, sequence: Sequence) -> None:
        """Takes slot and blocks from it."""
        assert sequence.slot is not None
        super().remove(sequence)
        self._delta.release(sequence.slot)
        heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        blocks, sequence.blocks, sequence.newly_full = sequence.blocks, [], []
        if sequence.num_in_flight:
            self._returning.append((sequence.last_step, blocks))
        else:
            self._pool.release(blocks)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the line, at its old place; its known tokens will be computed again."""
        self.remove(sequence)
        sequence.num_computed = sequence.num_planned = 0
        sequence.was_economical = False
        self._waiting.add(sequence)
        self._totals.num_preemptions += 1

    def give_back(self, num_committed: int) -> None:
        """Releases the blocks of sequences that left, as far as so many steps were the last to use them."""
        for last_step, blocks in self._returning:
            if last_step <= num_committed:
                self._pool.release(blocks)
        self._returning = [each for each in self._returning if each[0] > num_committed]

    def take_step(self, number: int, works: tuple[Work, ...], *, economical: bool) -> Step:
        """A step of these works, which tells the device all that has changed since the one before."""
        delta, self._delta = self._delta, _Delta()
        return Step(
            number=number,
            works=works,
            admitted=tuple(Admission.of(sequence, slot) for slot, sequence in delta.admitted.items()),
            grown=tuple(delta.grown.values()),
            released=tuple(delta.released),
            economical=economical,
        )


@dataclass(slots=True)
class _Delta:
    """What the device has to be told about slots with the next step."""

    released: list[int] = field(default_factory=list)
    admitted: dict[int, Sequence] = field(default_factory=dict)
    grown: dict[int, Growth] = field(default_factory=dict)

    def release(self, slot: int) -> None:
        self.grown.pop(slot, None)
        if self.admitted.pop(slot, None) is None:
            self.released.append(slot)

    def admit(self, slot: int, sequence: Sequence) -> None:
        self.admitted[slot] = sequence

    def grow(self, slot: int, index: int, blocks: list[int]) -> None:
        before = self.grown.get(slot)
        if before is None:
            self.grown[slot] = Growth(slot, index, tuple(blocks))
        else:
            assert index == before.index + len(before.blocks)
            self.grown[slot] = Growth(slot, before.index, (*before.blocks, *blocks))
