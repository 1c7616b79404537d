"""The step thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from holdfast.errors import InternalError
from services.engine.batch import Step, StepResult
from services.engine.blocks import BlockPool
from services.engine.loop import StepLoop
from services.engine.metrics import EngineMetrics
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import FinishReason, News, Sequence
from tests.engine.driver import sequence
from tests.engine.fake_runner import FakeRunner, Launched, expected_output


class HeldRunner(FakeRunner):
    """A runner whose steps end when the test says so."""

    def __init__(self, pool: BlockPool) -> None:
        super().__init__(pool)
        self.may_end = threading.Semaphore(0)
        self.num_launched = 0

    def launch(self, step: Step) -> Launched:
        self.num_launched += 1
        return super().launch(step)

    def collect(self, launched: Launched) -> StepResult:
        assert self.may_end.acquire(timeout=10)
        return super().collect(launched)


class Listener:
    """Hears the news, and confirms them unless it is told not to."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.num_calls = 0
        self.confirms = True
        self.loop: StepLoop[Launched] | None = None
        self._heard = asyncio.Event()

    def __call__(self, news: list[News]) -> None:
        self.news += news
        self.num_calls += 1
        self._heard.set()
        if self.confirms and self.loop is not None:
            self.loop.told()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self._heard.clear()
                await self._heard.wait()

    async def ended(self, *sequences: Sequence) -> None:
        """All these have told their end."""
        await self.until(lambda: {id(n.sequence) for n in self.news if n.finish} >= {id(each) for each in sequences})

    def tokens(self, each: Sequence) -> list[int]:
        return [token for news in self.news if news.sequence is each for token in news.token_ids]


@asynccontextmanager
async def running(
    runner: type[FakeRunner] = FakeRunner, *, lookahead: int = 0, max_untold: int = 64
) -> AsyncIterator[tuple[StepLoop[Launched], Listener, FakeRunner]]:
    pool = BlockPool(64, block_size=4)
    scheduler = Scheduler(pool, Limits(max_sequences=4, max_step_tokens=16, lookahead=lookahead))
    listener, device = Listener(), runner(pool)
    metrics = EngineMetrics(CollectorRegistry())
    loop = StepLoop(scheduler, device, deliver=listener, metrics=metrics, max_untold=max_untold)
    listener.loop = loop
    async with loop.running():
        yield loop, listener, device


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
async def test_what_is_added_is_answered(lookahead: int) -> None:
    """Sequences added from the event loop are computed, and their news come in order and once."""
    async with running(lookahead=lookahead) as (loop, listener, _):
        many = [sequence([i, i], max_tokens=6, arrival=i) for i in range(10)]
        loop.add(many)
        await listener.ended(*many)
        for each in many:
            assert listener.tokens(each) == expected_output(each.prompt_ids, each.stop)
        assert loop.load.num_running == loop.load.num_waiting == loop.load.num_active_blocks == 0
        assert loop.load.num_generated_tokens == 60


async def test_an_idle_thread_waits_and_wakes() -> None:
    """With nothing to compute no step is launched; what comes later is computed all the same."""
    async with running(HeldRunner) as (loop, listener, runner):
        assert isinstance(runner, HeldRunner)
        runner.may_end.release(100)
        for _ in range(3):
            each = sequence([1], max_tokens=2)
            loop.add([each])
            await listener.ended(each)
        assert runner.num_launched == 6


async def test_a_step_tells_its_news_in_one_call() -> None:
    """However many sequences decode in a step, the event loop is crossed once for it."""
    async with running(HeldRunner) as (loop, listener, runner):
        assert isinstance(runner, HeldRunner)
        many = [sequence([i], max_tokens=5) for i in range(4)]
        loop.add(many)
        runner.may_end.release(100)
        await listener.ended(*many)
        assert listener.num_calls <= 6


async def test_cancelling_takes_effect_before_the_next_step() -> None:
    """What is cancelled while a step runs gets no token of that step, and none after it."""
    async with running(HeldRunner) as (loop, listener, runner):
        assert isinstance(runner, HeldRunner)
        each = sequence([1], max_tokens=50)
        loop.add([each])
        runner.may_end.release(2)
        await listener.until(lambda: len(listener.tokens(each)) == 2)
        loop.cancel([each])
        runner.may_end.release(1)
        await listener.ended(each)
        assert each.finish is FinishReason.CANCELLED
        assert len(listener.tokens(each)) <= 3
        loop.cancel([each])


async def test_a_deadline_ends_what_waits_for_nothing_else() -> None:
    """A thread that has nothing to compute wakes for the deadline of what it holds."""
    async with running() as (loop, listener, _):
        first = sequence([1], max_tokens=1)
        waits_for_ever = sequence([2])
        waits_for_ever.num_in_flight = 1  # as if a step in flight still computed it
        waits_for_ever.deadline = time.time() + 0.05
        loop.add([waits_for_ever, first])
        await listener.ended(first, waits_for_ever)
        assert waits_for_ever.finish is FinishReason.DEADLINE


async def test_a_deadline_in_centuries_is_no_deadline() -> None:
    """A client may say "never" by a deadline that no clock can wait for; the thread goes on."""
    async with running() as (loop, listener, _):
        waits = sequence([2])
        waits.num_in_flight = 1  # as if a step in flight still computed it
        waits.deadline = time.time() + 1e12
        loop.add([waits])
        for _ in range(50):  # in some of the pauses between them the thread goes idle
            each = sequence([1], max_tokens=1)
            loop.add([each])
            await listener.ended(each)


async def test_too_many_untold_steps_stop_the_engine_until_they_are_confirmed() -> None:
    """Where the log does not take the tokens, the engine computes no further than it may hand over."""
    async with running(HeldRunner, max_untold=3) as (loop, listener, runner):
        assert isinstance(runner, HeldRunner)
        listener.confirms = False
        runner.may_end.release(1000)
        each = sequence([1], max_tokens=20)
        loop.add([each])
        await listener.until(lambda: listener.num_calls == 3)
        assert runner.num_launched <= 4
        listener.confirms = True
        for _ in range(3):
            loop.told()
        await listener.ended(each)


async def test_the_thread_stops_though_nobody_listens() -> None:
    """Leaving the block ends the thread even where it waits for its news to be confirmed."""
    async with asyncio.timeout(10):
        async with running(max_untold=1) as (loop, listener, _):
            listener.confirms = False
            loop.add([sequence([1], max_tokens=20)])
            await listener.until(lambda: listener.num_calls == 1)
    assert all(thread.name != "holdfast-steps" for thread in threading.enumerate())


async def test_a_crash_of_the_thread_surfaces() -> None:
    """What a runner raises is what the service hears, with its cause."""

    class Broken(FakeRunner):
        def collect(self, launched: Launched) -> StepResult:
            raise MemoryError("no more")

    async with running(Broken) as (loop, _, _):
        loop.add([sequence([1])])
        with pytest.raises(InternalError, match="MemoryError.*no more") as raised:
            await asyncio.wait_for(loop.watch(), 10)
        assert isinstance(raised.value.__cause__, MemoryError)


async def test_an_error_of_who_takes_the_news_surfaces() -> None:
    """Tokens that could not be handed over are gone, so the service must end, not go on without them."""

    class Careless(Listener):
        def __call__(self, news: list[News]) -> None:
            raise KeyError("dropped")

    pool = BlockPool(64, block_size=4)
    scheduler = Scheduler(pool, Limits(max_sequences=4, max_step_tokens=16))
    metrics = EngineMetrics(CollectorRegistry())
    loop = StepLoop(scheduler, FakeRunner(pool), deliver=Careless(), metrics=metrics)
    async with loop.running():
        loop.add([sequence([1])])
        with pytest.raises(InternalError, match="dropped"):
            await asyncio.wait_for(loop.watch(), 10)
