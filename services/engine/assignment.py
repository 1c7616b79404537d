"""What each running sequence computes in the next step, and the blocks for it.

A step takes one token of each sequence that decodes, then prefill chunks as far as its budget allows. A running sequence
that needs a block takes it from the youngest one running, never from an older one. Who is thrown out computes its tokens
again later; its full blocks stay in the prefix cache as long as nobody needs them. So the oldest always gets on.
"""

from __future__ import annotations

from services.engine.batch import Work
from services.engine.blocks import BlockPool
from services.engine.limits import Limits
from services.engine.prefill import PrefillBudget
from services.engine.running import Running
from services.engine.sequence import Phase, Sequence

_MOST_STEPS_OF_PROMPTS = 64
"""For so many steps at most decodes wait, where they may: however many prompts come, each answer gets on."""


class Assignment:
    """From the slots to the works of a step."""

    def __init__(self, pool: BlockPool, limits: Limits, running: Running, prefill: PrefillBudget) -> None:
        self._pool = pool
        self._limits = limits
        self._running = running
        self._prefill = prefill
        self._num_steps_of_prompts = 0  # since the last one in which decodes took part

    def assign(self) -> list[tuple[Sequence, Work]]:
        """The works of the next step and whose they are, decodes in front. Empty where nobody can compute anything."""
        if self._decodes_wait and (chunks := self._assigned(decoding=False)):
            self._num_steps_of_prompts += 1
            return chunks
        self._num_steps_of_prompts = 0
        return self._assigned(decoding=True)

    @property
    def _decodes_wait(self) -> bool:
        """Whether prompts fill the step, and it is theirs."""
        return (
            self._limits.decodes_may_wait
            and self._num_steps_of_prompts < _MOST_STEPS_OF_PROMPTS
            and sum(self._running.num_prefill_tokens().values()) >= self._limits.max_step_tokens
        )

    def _assigned(self, *, decoding: bool) -> list[tuple[Sequence, Work]]:
        """Decodes in front, where they take part; where not they get their blocks, lest prompts have them all. The first in line comes first,
        so that whoever is thrown out for want of blocks has nothing assigned yet."""
        decodes: list[tuple[Sequence, Work]] = []
        chunks: list[tuple[Sequence, Work]] = []
        left: dict[bool, int] | None = None
        for sequence in self._running:
            if sequence.phase is not Phase.RUNNING or sequence.has_all_planned:
                continue
            remaining = sequence.num_remaining
            if remaining == 1:
                if self._grow(sequence, 1) and decoding:
                    decodes.append((sequence, _work(sequence, 1, remaining)))
                continue
            if left is None:
                left = self._prefill.shares(self._prefill.tokens(beside_decodes=decoding))
            count = self._grow(sequence, min(remaining, left[sequence.interactive]))
            left = {interactive: tokens - count for interactive, tokens in left.items()}
            if count:
                (chunks if count > 1 else decodes).append((sequence, _work(sequence, count, remaining)))
        return decodes + chunks

    def _grow(self, sequence: Sequence, count: int) -> int:
        """Sees to blocks for the next `count` tokens of a sequence and, where there are plenty, for the `lookahead`
        tokens after them. Returns for how many of the tokens there are blocks now."""
        end = sequence.num_planned + count
        if end <= len(sequence.blocks) * self._pool.block_size:
            return count
        missing = self._pool.blocks_for(end) - len(sequence.blocks)
        while not self._pool.num_available and self._throw_out_after(sequence):
            pass
        ahead = self._pool.blocks_for(min(end + self._limits.lookahead, sequence.num_stored_at_most))
        plenty = self._pool.num_available > len(self._running)
        self._running.allocate(sequence, ahead - len(sequence.blocks) if plenty else missing)
        return min(end, len(sequence.blocks) * self._pool.block_size) - sequence.num_planned

    def _throw_out_after(self, sequence: Sequence) -> bool:
        """Preempts the youngest one running behind this one; batch ones that hold no more than their share only for the
        first in line, who has to get on. False where there is none, or where blocks are on their way back anyway."""
        behind = self._running.behind(sequence)
        if sequence.interactive and self._running.num_batch <= self._limits.batch_share:
            others = [each for each in behind if each.interactive]
            behind = others if others or sequence is not self._running.first else behind
        if self._running.has_blocks_returning or not behind:
            return False
        self._running.preempt(behind[-1])
        return True


def _work(sequence: Sequence, count: int, remaining: int) -> Work:
    assert sequence.slot is not None
    return Work(sequence.slot, start=sequence.num_planned, count=count, samples=count == remaining)
