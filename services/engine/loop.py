"""The step thread: take in, launch, commit, tell.

One thread owns the scheduler, the runner and the KV cache. The event loop never touches them: it leaves what it wants in
the inbox, and is told the news of each step by one call. Both directions are bounded: what comes in by the slots there
are (see `intake`), what goes out by `MAX_UNTOLD` steps whose tokens the log has not confirmed; then the thread waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from holdfast.errors import InternalError
from services.engine.batch import Step, StepResult
from services.engine.metrics import EngineMetrics
from services.engine.offload import Cache, Offload, Store
from services.engine.scheduler import Scheduler
from services.engine.sequence import FinishReason, News, Sequence

MAX_UNTOLD = 256
"""Steps handed over whose tokens are not in the log yet. At the limit the engine computes no further."""

LONGEST_WAIT = 3600.0
"""Seconds after which an idle thread looks again, whatever deadlines say: a wait of centuries is an OverflowError."""

SWITCH_SECONDS = 0.0005
"""How long Python lets the event loop go on while the step thread wants to. A step gives Python up in every operator and
wants it back some hundred times; at the default of 5 ms an event loop that never rests makes it 1.6 times as slow as at
this (measured with the 135M model on two cores), and one that rests notices no difference."""

L = TypeVar("L")


class Runner(Protocol[L]):
    """What computes steps, in the order of their launches."""

    def launch(self, step: Step) -> L:
        """Starts a step, and returns before it is done where the device allows it."""
        ...

    def collect(self, launched: L) -> StepResult:
        """Waits for a step."""
        ...

    def stop(self) -> None:
        """Said in any thread, when no result is wanted any more: no call may wait much longer, be it by an error."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine did last: a copy, for the event loop."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_active_blocks: int = 0
    num_cached_blocks: int = 0
    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


class StepLoop(Generic[L]):
    """The step thread and its two doors. Everything public is for the event loop, in which it must be made."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[L],
        *,
        deliver: Callable[[list[News]], None],
        metrics: EngineMetrics,
        store: tuple[Store, Cache] | None = None,
        max_untold: int = MAX_UNTOLD,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`deliver` is called in the event loop with the news of each step; for each call, `told` must follow. `store`:
        where prefixes are found that the engine no longer holds, and the cache they are copied to and from."""
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._metrics = metrics
        self._offload = Offload(scheduler, *store, ask=self._ask, call=self._call) if store is not None else None
        self._clock = clock
        self._event_loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._error: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._untold = threading.Semaphore(max_untold)
        self._in_flight: deque[L] = deque()
        self._launched_at: deque[float] = deque()
        self._leaving: list[tuple[Collection[Sequence], Callable[[], None]]] = []
        self._committed_at = 0.0
        self._idle = False
        self.is_stopping = False
        self.load = self._snapshot()

    # For the event loop.

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The thread, from its start to its end. What is not computed when the block is left never is. Within the block
        the threads of this process take turns more often (`SWITCH_SECONDS`)."""
        thread = threading.Thread(target=self._live, name="holdfast-steps", daemon=True)
        thread.start()
        default = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            yield
        finally:
            sys.setswitchinterval(default)
            self.is_stopping = True
            self._ask(lambda: None)  # wakes it
            self._untold.release()
            self._runner.stop()
            await asyncio.to_thread(thread.join)

    async def watch(self) -> None:
        """Raises InternalError when the thread, or who takes its news, fails; never returns before that, or its end."""
        await self._ended.wait()
        if isinstance(self._error, InternalError):
            raise self._error
        if self._error is not None:
            raise InternalError(f"the engine's step failed: {self._error!r}") from self._error

    def add(self, sequences: Iterable[Sequence]) -> None:
        """New sequences."""
        for each in sequences:
            self._ask(partial(self._add, each))

    def cancel(self, sequences: Iterable[Sequence], reason: FinishReason = FinishReason.CANCELLED) -> None:
        """These should end before the next step; those that ended already are left alone."""
        for each in sequences:
            self._ask(partial(self._cancel, each, reason))

    def let_go(self, sequences: Collection[Sequence], *, gone: Callable[[], None]) -> None:
        """Ends these as `cancel` does, and calls `gone`, in the event loop, when no step in flight computes anything of
        them: then the engine has outlived them."""
        self._ask(partial(self._let_go, sequences, gone))

    def told(self) -> None:
        """The log has all of the oldest news that were delivered and not confirmed yet."""
        self._untold.release()

    def _ask(self, act: Callable[[], None]) -> None:
        self._inbox.put(act)

    # In the step thread.

    def _live(self) -> None:
        try:
            while not self.is_stopping:
                self._take_in()
                self._launch()
                self._tell(self._commit())
                self._see_off()
        except BaseException as error:  # noqa: BLE001 - the service must hear why its thread ended
            self._error = error
        self._call(self._ended.set)

    def _take_in(self) -> None:
        """Does what was asked for: new sequences, cancelled ones, fetched and saved blocks. Where there is nothing to
        compute it waits for that, or for the next deadline."""
        with contextlib.suppress(queue.Empty):
            if self._idle:
                self._inbox.get(timeout=self._seconds_to_deadline())()
            while True:
                self._inbox.get_nowait()()
        self._scheduler.expire(self._clock())

    def _launch(self) -> None:
        """Launches steps as far ahead as may be."""
        while len(self._in_flight) <= self._scheduler.limits.lookahead:
            step = self._scheduler.plan(self._clock())
            if step is None:
                break
            self._launched_at.append(time.monotonic())
            self._in_flight.append(self._runner.launch(step))
        self._idle = not self._in_flight

    def _commit(self) -> list[Sequence]:
        """Takes the result of the oldest step in flight. Returns the sequences with news."""
        if not self._in_flight:
            return self._scheduler.take_news()
        result = self._runner.collect(self._in_flight.popleft())
        self._note_pace(result.step)
        news = self._scheduler.commit(result, self._clock())
        if self._offload is not None:
            self._offload.save_full()
        return news

    def _tell(self, sequences: list[Sequence]) -> None:
        """Hands the news over to the event loop; waits where too many are not in the log yet."""
        self.load = self._snapshot()
        if sequences:
            news = [sequence.tell() for sequence in sequences]
            self._untold.acquire()
            self._call(partial(self._hand_over, news))

    def _see_off(self) -> None:
        """Tells of those that were let go and are in no step any more."""
        leaving, self._leaving = self._leaving, []
        for sequences, gone in leaving:
            if any(each.num_in_flight for each in sequences):
                self._leaving.append((sequences, gone))
            else:
                self._call(gone)

    def _hand_over(self, news: list[News]) -> None:
        """In the event loop, which would only log an error: but then clients wait for tokens that nobody has."""
        try:
            self._deliver(news)
        except Exception as error:  # noqa: BLE001 - the service must hear why
            self._error = error
            self._ended.set()

    def _call(self, act: Callable[[], None]) -> None:
        self._event_loop.call_soon_threadsafe(act)

    def _seconds_to_deadline(self) -> float | None:
        deadline = self._scheduler.next_deadline
        return None if deadline is None else min(max(0.0, deadline - self._clock()), LONGEST_WAIT)

    def _note_pace(self, step: Step) -> None:
        """How long the step took: since its launch, or since the one before it was done."""
        now = time.monotonic()
        seconds = now - max(self._launched_at.popleft(), self._committed_at)
        self._committed_at = now
        self._metrics.step(step, seconds)
        self._scheduler.learn(step, seconds)

    def _snapshot(self) -> Load:
        scheduler, pool, totals = self._scheduler, self._scheduler.pool, self._scheduler.totals
        self._metrics.count(
            queried=totals.num_queried_tokens,
            hits=totals.num_cached_tokens,
            preemptions=totals.num_preemptions,
            prefill=totals.num_prefill_tokens,
            generated=totals.num_generated_tokens,
            economical=totals.num_economical_tokens,
        )
        return Load(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=pool.num_free,
            num_active_blocks=pool.num_active,
            num_cached_blocks=pool.num_cached,
            num_generated_tokens=totals.num_generated_tokens,
            num_prefill_tokens=totals.num_prefill_tokens,
            num_cached_tokens=totals.num_cached_tokens,
            num_preemptions=totals.num_preemptions,
        )

    def _add(self, sequence: Sequence) -> None:
        if self._offload is not None:
            self._offload.add(sequence)
        else:
            self._scheduler.add(sequence)

    def _let_go(self, sequences: Collection[Sequence], gone: Callable[[], None]) -> None:
        for each in sequences:
            self._cancel(each, FinishReason.CANCELLED)
        self._leaving.append((sequences, gone))

    def _cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.cancel(sequence, reason, now=self._clock())
