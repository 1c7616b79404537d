"""Which sequences run, on which blocks, and what the next step computes.

Continuous batching without phases: every running sequence has known tokens that are not computed; a step takes one
token of each that decodes, then prefill chunks as far as the step's time allows. The scheduler decides and keeps
account; it knows no tensor, no clock and no thread. One thread uses it, in this order, with up to `lookahead` more
plans than commits:

    add, cancel, expire ... step = plan(now) ... commit(result of the oldest step, now)

What it promises, and which of its parts keeps that:

* Interactive sequences come before batch ones, and first come is first served among equals; batch has a tenth of the
  slots and of each step's prefill all the same (`waiting`, `admission`, `prefill`).
* A running sequence that needs a block takes it from the youngest one running, so the oldest always gets on, and every
  sequence that is added ends (`assignment`).
* What is held of a prefix is not computed again, but for the last known token (`prefixes`).
* A block is given back only when the last step that uses it was committed (`running`).
* What the smaller copy of the weights computed (`copies`) is found by no other sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from services.engine.admission import AdmissionPolicy
from services.engine.assignment import Assignment
from services.engine.batch import Step, StepResult, Work
from services.engine.blocks import BlockPool
from services.engine.copies import Copies
from services.engine.limits import Limits
from services.engine.pace import Pace
from services.engine.prefill import PrefillBudget
from services.engine.prefixes import Prefixes
from services.engine.running import Running
from services.engine.sequence import FinishReason, Phase, Sequence, TokenLogprobs
from services.engine.totals import Totals
from services.engine.waiting import Waiting

__all__ = ["Limits", "Scheduler"]

_ENDED_UNANSWERED = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR)


class Scheduler:
    """Owns the slots, the block pool and every sequence from `add` to its end."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.totals = Totals()
        self.on_full: Callable[[int, bytes, bytes], None] | None = None
        """Told of every block that is newly known by its hash: the block, its hash, and that of the one before it
        (empty for a first one). Not before a token was sampled behind it: until then its content may be no numbers."""
        self._waiting = Waiting()
        self._running = Running(pool, self._waiting, self.totals, max_sequences=limits.max_sequences)
        self._prefixes = Prefixes(pool)
        self._copies = Copies(limits, self._waiting, self._running)
        prefill = PrefillBudget(limits, self._copies, self._running, block_size=pool.block_size)
        self._admission = AdmissionPolicy(
            pool,
            limits,
            waiting=self._waiting,
            running=self._running,
            prefixes=self._prefixes,
            prefill=prefill,
            totals=self.totals,
        )
        self._assignment = Assignment(pool, limits, self._running, prefill)
        self._in_flight: deque[tuple[Sequence, ...]] = deque()  # of each step, whose the works are
        self._news: dict[Sequence, None] = {}
        self._next_deadline: float | None = None  # no deadline of those held is earlier
        self._num_added = 0
        self._num_steps = 0
        self._num_committed = 0

    # What it is asked.

    @property
    def paces(self) -> dict[bool, Pace]:
        """Of the steps of each copy of the weights, the smaller one's under True."""
        return self._copies.paces

    @property
    def pace(self) -> Pace:
        """Of the copy of the weights that computed the newest step."""
        return self._copies.pace

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

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
        return self._prefixes.hashes_beyond(sequence)

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
            self._waiting.load(sequence)
        else:
            self._waiting.add(sequence)

    def loaded(self, sequence: Sequence) -> None:
        """What can be had from the KV store is in the pool now: the sequence may run. Does nothing where it ended
        meanwhile."""
        if sequence.phase is Phase.LOADING:
            self._waiting.remove(sequence)
            self._waiting.add(sequence)

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

    def learn(self, step: Step, seconds: float) -> None:
        """The step took so long, which the copy of the weights that computed it will take again."""
        self._copies.learn(step, seconds)

    def take_news(self) -> list[Sequence]:
        """The sequences that got tokens or ended since this was last asked."""
        news, self._news = list(self._news), {}
        return news

    def _held(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    # The step.

    def plan(self, now: float) -> Step | None:
        """The next step, None where nothing can be computed before something else happens: a commit, a new sequence,
        a block given back by the KV store's client."""
        in_danger = self._copies.is_in_danger(now)
        self._admission.admit(now)
        assigned = self._assignment.assign()
        if not assigned:
            return None
        sequences, works = zip(*assigned, strict=True)
        economical = self._copies.choose(sequences, in_danger=in_danger)
        return self._take_off(sequences, works, economical=economical)

    def commit(self, result: StepResult, now: float) -> list[Sequence]:
        """Takes the result of the oldest step in flight, and returns the sequences with news. Rows of sequences that
        ended meanwhile are dropped; those of preempted ones are kept, so that nothing is sampled twice."""
        step = result.step
        samples = enumerate(zip(result.token_ids, result.logprobs, strict=True))
        for sequence, work in self._land(step):
            index, sample = next(samples) if work.samples else (-1, None)
            if sequence.is_finished:
                continue
            if index in result.failed:
                self._fail(sequence, now)
            else:
                self._take_result(sequence, work, sample, now, economical=step.economical)
        self._running.give_back(self._num_committed)
        return self.take_news()

    # Steps in flight.

    def _take_off(self, sequences: tuple[Sequence, ...], works: tuple[Work, ...], *, economical: bool) -> Step:
        """A step of these works, which is in flight from now on."""
        self._num_steps += 1
        step = self._running.take_step(self._num_steps, works, economical=economical)
        for sequence, work in zip(sequences, works, strict=True):
            sequence.num_planned = work.end
            sequence.num_pending += work.samples
            sequence.num_in_flight += 1
            sequence.last_step = self._num_steps
        self._in_flight.append(sequences)
        return step

    def _land(self, step: Step) -> list[tuple[Sequence, Work]]:
        """The step, which is the oldest, is no longer in flight. Returns its works and whose they are."""
        assert step.number == self._num_committed + 1, "steps are committed in the order of their plans"
        self._num_committed = step.number
        landed = list(zip(self._in_flight.popleft(), step.works, strict=True))
        for sequence, work in landed:
            sequence.num_in_flight -= 1
            sequence.num_pending -= work.samples
        return landed

    # Results.

    def _take_result(
        self,
        sequence: Sequence,
        work: Work,
        sample: tuple[int, TokenLogprobs | None] | None,
        now: float,
        *,
        economical: bool,
    ) -> None:
        if sequence.phase is Phase.RUNNING:
            sequence.was_economical |= economical
            self._note_computed(sequence, work)
        if sample is not None:
            if sequence.newly_full:
                self._tell_of_full(sequence)
            self.totals.num_economical_tokens += economical
            self._append(sequence, *sample, now=now)

    def _fail(self, sequence: Sequence, now: float) -> None:
        """What was computed of it is no number: nobody else must find it in the cache."""
        self.pool.forget(sequence.blocks)
        sequence.error = "the model's output is not a number after these tokens; the engine cannot continue them"
        self._end(sequence, FinishReason.ERROR, now)

    def _note_computed(self, sequence: Sequence, work: Work) -> None:
        self._prefixes.register(sequence, sequence.num_computed, work.end)
        sequence.num_computed = work.end
        # A sampled token's keys are computed by the step after, so one token of each decode is no prefill.
        self.totals.num_prefill_tokens += work.count if work.start < len(sequence.prompt_ids) or work.count > 1 else 0

    def _tell_of_full(self, sequence: Sequence) -> None:
        for full in self._prefixes.take_newly_full(sequence):
            if self.on_full is not None:
                self.on_full(*full)

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, *, now: float) -> None:
        reason = sequence.append(token_id, logprobs)
        self.totals.num_generated_tokens += 1
        self._news[sequence] = None
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if reason is not None:
            self._end(sequence, reason, now)

    # Ends.

    def _refuse(self, sequence: Sequence) -> None:
        sequence.error = (
            f"prompt ({len(sequence.prompt_ids)} tokens) and answer (at most {sequence.stop.max_tokens}) together need "
            f"{self.pool.blocks_for(sequence.num_stored_at_most)} blocks of {self.pool.block_size} tokens; "
            f"the whole cache has {self.pool.num_blocks}"
        )
        self._finish(sequence, FinishReason.ERROR, sequence.arrival)

    def _end(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        """Takes it from where it stands."""
        (self._running if sequence.phase is Phase.RUNNING else self._waiting).remove(sequence)
        self._finish(sequence, reason, now)

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        sequence.phase, sequence.finish, sequence.ended_at = Phase.FINISHED, reason, now
        self._news[sequence] = None
