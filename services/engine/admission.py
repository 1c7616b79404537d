"""Which waiting sequences get a slot, in whose turn, and whether there is room for them.

Interactive sequences come before batch ones, and first come is first served among equals. Batch sequences may hold a
tenth of the slots against interactive ones, with their blocks; beyond it they yield, and within it none of them keeps an
interactive one from being admitted for longer than until a slot or a block is free.
"""

from __future__ import annotations

from services.engine.blocks import BlockPool
from services.engine.limits import Limits
from services.engine.prefill import PrefillBudget
from services.engine.prefixes import Prefixes
from services.engine.running import Running
from services.engine.sequence import Sequence
from services.engine.totals import Totals
from services.engine.waiting import Waiting


class AdmissionPolicy:
    """From the line to the slots."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        waiting: Waiting,
        running: Running,
        prefixes: Prefixes,
        prefill: PrefillBudget,
        totals: Totals,
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._waiting = waiting
        self._running = running
        self._prefixes = prefixes
        self._prefill = prefill
        self._totals = totals

    def admit(self, now: float) -> None:
        """Gives slots to waiting sequences as long as the step has tokens for them and there are blocks."""
        if not self._waiting.heads:
            return
        budget = self._prefill.tokens(beside_decodes=not self._limits.decodes_may_wait)
        wanted = self._running.num_prefill_tokens()
        while newcomer := self._next(budget, wanted):
            self._start(newcomer, now)
            wanted[newcomer.interactive] += newcomer.num_remaining

    def _next(self, budget: int, wanted: dict[bool, int]) -> Sequence | None:
        """Who is admitted next; there is room for it now."""
        for sequence in self._next_in_line():
            num_tokens = self._prefill.left_for(sequence, budget, wanted)
            if num_tokens > 0 and self._make_room(sequence, num_tokens):
                return sequence
        return None

    def _next_in_line(self) -> list[Sequence]:
        """Who may be admitted next, the one to try first in front."""
        ready = self._waiting.ready
        if self._running.num_batch < self._limits.batch_share:
            return sorted(ready, key=lambda head: (head.arrival, head.order))
        return ready[:1]

    def _make_room(self, newcomer: Sequence, num_tokens: int) -> bool:
        """Whether there is a slot for it, and blocks for its first chunk beside a reserve for those that run. Batch
        sequences are thrown out for an interactive one."""
        while not (self._running.has_free_slot and self._has_blocks_for(newcomer, num_tokens)):
            victim = self._running.youngest
            yields = newcomer.interactive and self._running.num_batch > self._limits.batch_share
            if not yields or victim is None or self._running.has_blocks_returning:
                return False
            self._running.preempt(victim)
        return True

    def _has_blocks_for(self, newcomer: Sequence, num_tokens: int) -> bool:
        hits = self._prefixes.cached(newcomer)
        first = min(newcomer.num_known, len(hits) * self._pool.block_size + num_tokens)
        wanted = self._pool.blocks_for(first) - len(hits) + self._pool.num_idle(hits)
        return self._pool.num_available - wanted >= self._reserve(newcomer)

    def _reserve(self, newcomer: Sequence) -> int:
        """Blocks that running sequences will want soon: the rest of their prompts, or the next one. A batch one's prompt
        takes its time, and keeps no interactive newcomer out."""
        return sum(
            1
            if newcomer.interactive and not each.interactive
            else max(1, self._pool.blocks_for(each.num_known + 1) - len(each.blocks))
            for each in self._running
        )

    def _start(self, sequence: Sequence, now: float) -> None:
        """Gives it a slot and the blocks of its prefix that are held."""
        hits = self._prefixes.cached(sequence)
        self._waiting.remove(sequence)
        self._running.add(sequence)
        self._running.share(sequence, hits)
        sequence.num_computed = sequence.num_planned = len(hits) * self._pool.block_size
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_ids))
            self._totals.num_queried_tokens += len(sequence.prompt_ids)
            self._totals.num_cached_tokens += sequence.num_cached
