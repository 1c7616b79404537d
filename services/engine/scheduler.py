"""Which sequences run, on which blocks, and what the next step computes.

Continuous batching without phases: every running sequence has known tokens that are not computed; a step takes one
token of each that decodes, then prefill chunks as far as the step's time allows. The scheduler decides and keeps
account; it knows no tensor, no clock and no thread. One thread uses it, in this order, with up to `lookahead` more
plans than commits:

    add, cancel, expire ... step = plan(now) ... commit(result of the oldest step, now)

What it promises:

* Interactive sequences come before batch ones, and first come is first served among equals. Batch sequences may hold a
  tenth of the slots against interactive ones, with their blocks, and a tenth of each step's prefill; beyond it they yield,
  and within it none of them keeps an interactive one from being admitted for longer than until a slot or a block is free.
* A running sequence that needs a block takes it from the youngest one running, never from an older one. Who is thrown
  out computes its tokens again later; its full blocks stay in the prefix cache as long as nobody needs them. So the
  oldest always gets on, and every sequence that is added ends.
* A prefix hit never covers the last known token: its logits are what the next token is sampled from.
* A block is given back only when the last step that uses it was committed.
* The device hears of a slot in the order released, admitted, grown; a slot it never heard of is never released.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from services.engine.batch import Admission, Growth, Step, StepResult, Work
from services.engine.blocks import BlockPool, chain_hash
from services.engine.pace import Pace
from services.engine.sequence import FinishReason, Phase, Sequence, TokenLogprobs

_ENDED_UNANSWERED = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may be."""

    max_sequences: int
    """Slots."""
    max_step_tokens: int
    """Most tokens in a step; at least one for each slot."""
    lookahead: int = 0
    """How many steps may be planned before the result of the oldest is committed, that one apart."""
    itl_target: float = 0.2
    """Seconds between two tokens that prefill should leave to running sequences."""

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_sequences:
            raise ValueError(
                f"max_step_tokens must be at least max_sequences ({self.max_sequences}), not {self.max_step_tokens}"
            )

    @property
    def batch_share(self) -> int:
        """Slots that batch sequences hold against interactive ones: a tenth; of a single one nothing."""
        return _tenth(self.max_sequences)


@dataclass(slots=True)
class Totals:
    """What happened since the start."""

    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    """Tokens computed of prompts, and of outputs after a preemption."""
    num_queried_tokens: int = 0
    """Prompt tokens that were looked for in the prefix cache."""
    num_cached_tokens: int = 0
    """Those of them that were found."""
    num_preemptions: int = 0


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

    def step(self, number: int, works: tuple[Work, ...]) -> Step:
        """The step that brings all of this along."""
        return Step(
            number=number,
            works=works,
            admitted=tuple(Admission.of(sequence, slot) for slot, sequence in self.admitted.items()),
            grown=tuple(self.grown.values()),
            released=tuple(self.released),
        )


class _Line:
    """Sequences in their order."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Over a copy, so that the line may change meanwhile."""
        return iter(self._sequences[:])

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._sequences, sequence.order, key=_order)
        assert self._sequences[index] is sequence
        del self._sequences[index]

    @property
    def first(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    @property
    def youngest(self) -> Sequence | None:
        return self._sequences[-1] if self._sequences else None


def _order(sequence: Sequence) -> tuple[bool, float, int]:
    return sequence.order


class Scheduler:
    """Owns the slots, the block pool and every sequence from `add` to its end."""

    def __init__(self, pool: BlockPool, limits: Limits, *, pace: Pace | None = None) -> None:
        self.pool = pool
        self.limits = limits
        self.pace = pace or Pace()
        self.totals = Totals()
        self.on_full: Callable[[int, bytes, bytes], None] | None = None
        """Told of every block that is newly known by its hash: the block, its hash, and that of the one before it
        (empty for a first one)."""
        self._free_slots = list(range(limits.max_sequences))
        heapify(self._free_slots)  # the lowest first, so that slots in use lie close together
        self._loading: set[Sequence] = set()
        self._waiting = {True: _Line(), False: _Line()}  # by `interactive`
        self._running = _Line()
        self._delta = _Delta()
        self._in_flight: deque[tuple[Sequence, ...]] = deque()  # of each step, whose the works are
        self._returning: list[tuple[int, list[int]]] = []  # blocks, and the step after which they are nobody's
        self._news: dict[Sequence, None] = {}
        self._next_deadline: float | None = None  # no deadline of those held is earlier
        self._num_added = 0
        self._num_steps = 0
        self._num_committed = 0

    # What it is asked.

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting[True]) + len(self._waiting[False]) + len(self._loading)

    @property
    def num_held(self) -> int:
        """Sequences that have not ended."""
        return self.num_running + self.num_waiting

    @property
    def next_deadline(self) -> float | None:
        """When to call `expire` again, if nothing else happens before."""
        return self._next_deadline

    def hashes_beyond_cache(self, sequence: Sequence) -> list[bytes]:
        """The chained hashes of the full blocks that would save work and that are not held here, first one first."""
        if not self.pool.keeps_prefixes:
            return []
        hashes = self._usable_hashes(sequence)
        return hashes[len(self.pool.match(hashes)) :]

    # What it is told.

    def add(self, sequence: Sequence, *, loading: bool = False) -> None:
        """A new sequence. One that could never run ends with ERROR. `loading`: it waits until `loaded` is called."""
        assert sequence.phase is Phase.WAITING
        self._num_added += 1
        sequence.order = (not sequence.interactive, sequence.arrival, self._num_added)
        if self.pool.blocks_for(sequence.num_stored_at_most) > self.pool.num_blocks:
            self._refuse(sequence)
            return
        if sequence.deadline is not None:
            self._next_deadline = min(sequence.deadline, self._next_deadline or sequence.deadline)
        if loading:
            sequence.phase = Phase.LOADING
            self._loading.add(sequence)
        else:
            self._waiting[sequence.interactive].add(sequence)

    def loaded(self, sequence: Sequence) -> None:
        """What can be had from the KV store is in the pool now: the sequence may run. Does nothing where it ended
        meanwhile."""
        if sequence.phase is Phase.LOADING:
            self._loading.remove(sequence)
            sequence.phase = Phase.WAITING
            self._waiting[sequence.interactive].add(sequence)

    def cancel(self, sequence: Sequence, reason: FinishReason, *, now: float, error: str = "") -> None:
        """Ends a sequence in whatever phase it is; what it held is free for the next plan, as far as no step in flight
        uses it. Does nothing where it ended already."""
        assert reason in _ENDED_UNANSWERED
        if not sequence.is_finished:
            sequence.error = error
            self._end(sequence, reason, now)

    def expire(self, now: float) -> None:
        """Ends the sequences whose deadline has passed."""
        if self._next_deadline is None or now < self._next_deadline:
            return
        for sequence in self._held():
            if sequence.deadline is not None and sequence.deadline <= now:
                self.cancel(sequence, FinishReason.DEADLINE, now=now)
        self._next_deadline = min((each.deadline for each in self._held() if each.deadline is not None), default=None)

    def take_news(self) -> list[Sequence]:
        """The sequences that got tokens or ended since this was last asked."""
        news, self._news = list(self._news), {}
        return news

    def _held(self) -> list[Sequence]:
        return [*self._running, *self._waiting[True], *self._waiting[False], *self._loading]

    # The step.

    def plan(self, now: float) -> Step | None:
        """The next step, None where nothing can be computed before something else happens: a commit, a new sequence,
        a block given back by the KV store's client."""
        if self._waiting[True] or self._waiting[False]:
            self._admit(now)
        assigned = self._assign()
        if not assigned:
            return None
        self._num_steps += 1
        sequences, works = zip(*assigned, strict=True)
        step = self._delta.step(self._num_steps, works)
        self._delta = _Delta()
        for sequence, work in assigned:
            self._take_off(sequence, work)
        self._in_flight.append(sequences)
        return step

    def commit(self, result: StepResult, now: float) -> list[Sequence]:
        """Takes the result of the oldest step in flight, and returns the sequences with news. Rows of sequences that
        ended meanwhile are dropped; those of preempted ones are kept, so that nothing is sampled twice."""
        step = result.step
        assert step.number == self._num_committed + 1, "steps are committed in the order of their plans"
        self._num_committed = step.number
        samples = enumerate(zip(result.token_ids, result.logprobs, strict=True))
        for sequence, work in zip(self._in_flight.popleft(), step.works, strict=True):
            index, sample = next(samples) if work.samples else (-1, None)
            if self._land(sequence, work) and index in result.failed:
                self._fail(sequence, now)
            elif not sequence.is_finished:
                self._take_result(sequence, work, sample, now)
        self._give_back()
        return self.take_news()

    # Admission.

    def _admit(self, now: float) -> None:
        """Gives slots to waiting sequences as long as the step has tokens for them and there are blocks."""
        budget = self._prefill_tokens()
        prefilling = self._prefilling()
        while True:
            for sequence in self._next_in_line():
                num_tokens = self._tokens_for(sequence, budget, prefilling)
                if num_tokens > 0 and self._make_room(sequence, num_tokens):
                    self._start(sequence, now)
                    prefilling[sequence.interactive] += sequence.num_remaining
                    break
            else:
                return

    def _prefilling(self) -> dict[bool, int]:
        """By `interactive`, the tokens of prompts that running sequences have yet to compute."""
        tokens = {True: 0, False: 0}
        for sequence in self._running:
            if not sequence.has_all_planned and sequence.num_remaining > 1:
                tokens[sequence.interactive] += sequence.num_remaining
        return tokens

    def _tokens_for(self, sequence: Sequence, budget: int, prefilling: dict[bool, int]) -> int:
        """How many tokens the next step may have for one that is not admitted yet. Those of batch ones are in nobody's way
        but their own; and where interactive ones fill the step batch ones have their share."""
        left = budget - prefilling[True]
        return left if sequence.interactive else max(left, _tenth(budget)) - prefilling[False]

    def _next_in_line(self) -> list[Sequence]:
        """Who may be admitted next, the one to try first in front."""
        heads = [head for line in (self._waiting[True], self._waiting[False]) if (head := _first_ready(line))]
        if self._num_batch_running < self.limits.batch_share:
            return sorted(heads, key=lambda head: (head.arrival, head.order))
        return heads[:1]

    @property
    def _num_batch_running(self) -> int:
        return sum(not sequence.interactive for sequence in self._running)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether there is a slot for it, and blocks for its first chunk beside a reserve for those that run. Batch
        sequences are thrown out for an interactive one."""
        while not (self._free_slots and self._has_blocks_for(sequence, num_tokens)):
            victim = self._running.youngest
            yields = sequence.interactive and self._num_batch_running > self.limits.batch_share
            if not yields or victim is None or self._returning:
                return False
            self._preempt(victim)
        return True

    def _has_blocks_for(self, sequence: Sequence, num_tokens: int) -> bool:
        hits = self._cached_prefix(sequence)
        first = min(sequence.num_known, len(hits) * self.pool.block_size + num_tokens)
        wanted = self.pool.blocks_for(first) - len(hits) + self.pool.num_idle(hits)
        return self.pool.num_available - wanted >= self._reserve(sequence)

    def _reserve(self, newcomer: Sequence) -> int:
        """Blocks that running sequences will want soon: the rest of their prompts, or the next one. A batch one's prompt
        takes its time, and keeps no interactive newcomer out."""
        return sum(
            1
            if newcomer.interactive and not each.interactive
            else max(1, self.pool.blocks_for(each.num_known + 1) - len(each.blocks))
            for each in self._running
        )

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest prefix that is held and leaves something to compute."""
        return self.pool.match(self._usable_hashes(sequence)) if self.pool.keeps_prefixes else []

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        return self._hashes(sequence, (sequence.num_known - 1) // self.pool.block_size)

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """The chained hashes of its first `count` blocks."""
        hashes, size = sequence.block_hashes, self.pool.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else self.pool.root
            hashes.append(chain_hash(parent, sequence.token_ids(start, start + size)))
        return hashes[:count]

    def _start(self, sequence: Sequence, now: float) -> None:
        """Gives it a slot and the blocks of its prefix that are held."""
        hits = self._cached_prefix(sequence)
        self._waiting[sequence.interactive].remove(sequence)
        self._running.add(sequence)
        sequence.phase = Phase.RUNNING
        sequence.slot = heappop(self._free_slots)
        self._delta.admit(sequence.slot, sequence)
        if hits:
            self.pool.share(hits)
            sequence.blocks.extend(hits)
            self._delta.grow(sequence.slot, 0, hits)
        sequence.num_computed = sequence.num_planned = len(hits) * self.pool.block_size
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_ids))
            self.totals.num_queried_tokens += len(sequence.prompt_ids)
            self.totals.num_cached_tokens += sequence.num_cached

    # Planning.

    def _prefill_tokens(self) -> int:
        """How many tokens of prefill the next step may have beside the decodes."""
        decoding = [s for s in self._running if s.num_remaining == 1 and not s.has_all_planned]
        spare = self.limits.max_step_tokens - len(decoding)
        if not decoding:
            return spare
        kv_tokens = sum(sequence.num_planned + 1 for sequence in decoding)
        within = self.pace.tokens_within(self.limits.itl_target, kv_tokens=kv_tokens) - len(decoding)
        return int(min(spare, max(within, self.pool.block_size)))

    def _assign(self) -> list[tuple[Sequence, Work]]:
        """What each running sequence computes, decodes in front. The first in line comes first, so that whoever is
        thrown out for want of blocks has nothing assigned yet."""
        decodes: list[tuple[Sequence, Work]] = []
        chunks: list[tuple[Sequence, Work]] = []
        left: dict[bool, int] | None = None
        for sequence in self._running:
            if sequence.phase is not Phase.RUNNING or sequence.has_all_planned:
                continue
            remaining = sequence.num_remaining
            if remaining == 1:
                if self._grow(sequence, 1):
                    decodes.append((sequence, _work(sequence, 1, remaining)))
                continue
            if left is None:
                left = self._shares_of_prefill()
            count = self._grow(sequence, min(remaining, left[sequence.interactive]))
            left = {interactive: tokens - count for interactive, tokens in left.items()}
            if count:
                (chunks if count > 1 else decodes).append((sequence, _work(sequence, count, remaining)))
        return decodes + chunks

    def _shares_of_prefill(self) -> dict[bool, int]:
        """By `interactive`, the tokens of prefill in the next step: interactive ones come first, and leave batch ones their
        share where they want it."""
        budget = self._prefill_tokens()
        return {True: budget - (_tenth(budget) if self._prefilling()[False] else 0), False: budget}

    def _grow(self, sequence: Sequence, count: int) -> int:
        """Sees to blocks for the next `count` tokens of a sequence and, where there are plenty, for the `lookahead`
        tokens after them. Returns for how many of the tokens there are blocks now."""
        end = sequence.num_planned + count
        if end <= len(sequence.blocks) * self.pool.block_size:
            return count
        missing = self.pool.blocks_for(end) - len(sequence.blocks)
        while not self.pool.num_available and self._throw_out_after(sequence):
            pass
        ahead = self.pool.blocks_for(min(end + self.limits.lookahead, sequence.num_stored_at_most))
        plenty = self.pool.num_available > len(self._running)
        self._append_blocks(sequence, ahead - len(sequence.blocks) if plenty else missing)
        return min(end, len(sequence.blocks) * self.pool.block_size) - sequence.num_planned

    def _append_blocks(self, sequence: Sequence, count: int) -> None:
        """As many of `count` blocks as are available."""
        assert sequence.slot is not None
        blocks = self.pool.allocate(min(count, self.pool.num_available))
        if blocks:
            self._delta.grow(sequence.slot, len(sequence.blocks), blocks)
            sequence.blocks.extend(blocks)

    def _throw_out_after(self, sequence: Sequence) -> bool:
        """Preempts the youngest one running behind this one; batch ones that hold no more than their share only for the
        first in line, who has to get on. False where there is none, or where blocks are on their way back anyway."""
        behind = list(self._running)
        behind = behind[behind.index(sequence) + 1 :]
        if sequence.interactive and self._num_batch_running <= self.limits.batch_share:
            others = [each for each in behind if each.interactive]
            behind = others if others or sequence is not self._running.first else behind
        if self._returning or not behind:
            return False
        self._preempt(behind[-1])
        return True

    def _take_off(self, sequence: Sequence, work: Work) -> None:
        """The work is part of the step that was just planned."""
        sequence.num_planned = work.end
        sequence.num_pending += work.samples
        sequence.num_in_flight += 1
        sequence.last_step = self._num_steps

    # Results.

    def _land(self, sequence: Sequence, work: Work) -> bool:
        """The work is no longer in flight. Returns whether anybody still wants its result."""
        sequence.num_in_flight -= 1
        sequence.num_pending -= work.samples
        return not sequence.is_finished

    def _take_result(
        self, sequence: Sequence, work: Work, sample: tuple[int, TokenLogprobs | None] | None, now: float
    ) -> None:
        if sequence.phase is Phase.RUNNING:
            self._compute_until(sequence, work)
        if sample is not None:
            self._append(sequence, *sample, now=now)

    def _fail(self, sequence: Sequence, now: float) -> None:
        """What was computed of it is no number: nobody else must find it in the cache."""
        self.pool.forget(sequence.blocks)
        sequence.error = "the model's output is not a number after these tokens; the engine cannot continue them"
        self._end(sequence, FinishReason.ERROR, now)

    def _compute_until(self, sequence: Sequence, work: Work) -> None:
        """Notes that the tokens are computed, and the hashes of the blocks that are full with them."""
        size = self.pool.block_size
        first_full, end_full = sequence.num_computed // size, work.end // size
        sequence.num_computed = work.end
        # A sampled token's keys are computed by the step after, so one token of each decode is no prefill.
        self.totals.num_prefill_tokens += work.count if work.start < len(sequence.prompt_ids) or work.count > 1 else 0
        if self.pool.keeps_prefixes and end_full > first_full:
            hashes = self._hashes(sequence, end_full)
            for index in range(first_full, end_full):
                self._name(sequence.blocks[index], hashes[index], hashes[index - 1] if index else b"")

    def _name(self, block: int, block_hash: bytes, parent: bytes) -> None:
        if self.pool.register(block, block_hash) and self.on_full is not None:
            self.on_full(block, block_hash, parent)

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, *, now: float) -> None:
        reason = sequence.append(token_id, logprobs)
        self.totals.num_generated_tokens += 1
        self._news[sequence] = None
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if reason is not None:
            self._end(sequence, reason, now)

    # Leaving.

    def _refuse(self, sequence: Sequence) -> None:
        sequence.error = (
            f"prompt ({len(sequence.prompt_ids)} tokens) and answer (at most {sequence.stop.max_tokens}) together need "
            f"{self.pool.blocks_for(sequence.num_stored_at_most)} blocks of {self.pool.block_size} tokens; "
            f"the whole cache has {self.pool.num_blocks}"
        )
        sequence.phase, sequence.finish, sequence.ended_at = Phase.FINISHED, FinishReason.ERROR, sequence.arrival
        self._news[sequence] = None

    def _end(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        if sequence.phase is Phase.RUNNING:
            self._vacate(sequence)
        elif sequence.phase is Phase.WAITING:
            self._waiting[sequence.interactive].remove(sequence)
        elif sequence.phase is Phase.LOADING:
            self._loading.remove(sequence)
        sequence.phase, sequence.finish, sequence.ended_at = Phase.FINISHED, reason, now
        self._news[sequence] = None

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line, at its old place; its known tokens will be computed again."""
        self._vacate(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_computed = sequence.num_planned = 0
        self._waiting[sequence.interactive].add(sequence)
        self.totals.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        """Takes slot and blocks from a running sequence."""
        assert sequence.slot is not None
        self._running.remove(sequence)
        self._delta.release(sequence.slot)
        heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        blocks, sequence.blocks = sequence.blocks, []
        if sequence.num_in_flight:
            self._returning.append((sequence.last_step, blocks))
        else:
            self.pool.release(blocks)

    def _give_back(self) -> None:
        """Releases the blocks of sequences that left whose last step is committed now."""
        for last_step, blocks in self._returning:
            if last_step <= self._num_committed:
                self.pool.release(blocks)
        self._returning = [each for each in self._returning if each[0] > self._num_committed]


def _work(sequence: Sequence, count: int, remaining: int) -> Work:
    assert sequence.slot is not None
    return Work(sequence.slot, start=sequence.num_planned, count=count, samples=count == remaining)


def _tenth(number: int) -> int:
    """Rounded up, but never all."""
    return -(-number // 10) if number > 1 else 0


def _first_ready(line: _Line) -> Sequence | None:
    """The first that may be admitted: no step in flight computes anything of it, and where it shares a prompt, that is
    computed."""
    return next((s for s in line if not s.num_in_flight and _prompt_is_shared(s)), None)


def _prompt_is_shared(sequence: Sequence) -> bool:
    first = sequence.shares_prompt_with
    return first is None or first.is_finished or bool(first.output_ids)
