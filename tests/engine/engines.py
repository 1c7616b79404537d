"""Whole engines on a bus, with the fake runner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass

from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry

from holdfast.bus import Bus
from holdfast.topics import TOPICS
from services.engine.batch import Step
from services.engine.blocks import BlockPool
from services.engine.engine import Engine
from services.engine.metrics import EngineMetrics
from services.engine.scheduler import Limits, Scheduler
from services.engine.validation import Served
from tests.engine.fake_runner import EOS, VOCABULARY, FakeRunner, Launched

SERVED = Served(model="fake", context_length=200, vocab_size=VOCABULARY, stop_token_ids=frozenset({EOS}))


async def until(holds: Callable[[], bool]) -> None:
    """Lets the event loop turn until something holds."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what is waited for is another thread's, or another task's
            await asyncio.sleep(0)


@dataclass(frozen=True)
class Poison:
    """A prompt of which engines die."""

    prompt_ids: list[int]
    num_known: int = 0
    """Where so many tokens are known beside it,"""
    num_own: int = 0
    """or the engine itself has added so many; 0 for no such limit."""

    def is_met(self, known: Seq[int], num_known: int) -> bool:
        """Whether whoever computes the next token dies: of a sequence that it began with the tokens known, and that has
        so many now."""
        num_prompt = len(self.prompt_ids)
        if list(known[:num_prompt]) != self.prompt_ids:
            return False
        if self.num_own:
            return num_known >= len(known) + self.num_own
        return num_known >= num_prompt + self.num_known


class GatedRunner(FakeRunner):
    """A runner that can be held, and let go step by step, and dies of poison."""

    def __init__(self, pool: BlockPool, taste: int = 0, poison: Poison | None = None) -> None:
        super().__init__(pool, taste)
        self._poison = poison
        self._gate = threading.Condition()
        self._num_allowed = float("inf")
        self.engine_stops: Callable[[], bool] = lambda: False

    def launch(self, step: Step) -> Launched:
        with self._gate:
            while not self._gate.wait_for(lambda: self._num_allowed > 0, timeout=0.01):
                if self.engine_stops():
                    break
            self._num_allowed -= 1
        launched = super().launch(step)
        if self._poison is not None:
            for work in step.works:
                known = self.slots[work.slot].admission.token_ids
                if work.samples and self._poison.is_met(known, work.end):
                    raise MemoryError("poisoned")
        return launched

    def hold(self) -> None:
        """No further step is launched."""
        with self._gate:
            self._num_allowed = 0

    def allow(self, num_steps: float = float("inf")) -> None:
        """So many more steps may be launched."""
        with self._gate:
            self._num_allowed += num_steps
            self._gate.notify_all()


@dataclass
class Running:
    """An engine that runs, and what a test looks at."""

    engine: Engine[Launched]
    runner: GatedRunner
    pool: BlockPool
    registry: CollectorRegistry

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"holdfast_{name}", labels) or 0.0

    async def until_idle(self) -> None:
        """Until nothing holds a slot or a block."""
        await until(lambda: not (self.engine.steps.load.num_active_blocks or self.engine.steps.load.num_running))

    def num_open(self, *, interactive: bool = True) -> int:
        """Choices that were taken and have not ended."""
        return self.engine.requests.num_open(interactive=interactive)


@asynccontextmanager
async def engine(
    bus: Bus,
    *,
    name: str = "engine",
    max_sequences: int = 4,
    num_blocks: int = 64,
    drain_seconds: float = 10.0,
    lookahead: int = 0,
    tracer: Tracer | None = None,
    taste: int = 0,
    poison: Poison | None = None,
    incarnation: int = 0,
) -> AsyncIterator[Running]:
    await bus.create_topics(TOPICS)
    pool = BlockPool(num_blocks, block_size=4)
    limits = Limits(max_sequences=max_sequences, max_step_tokens=32, lookahead=lookahead)
    runner, registry = GatedRunner(pool, taste, poison), CollectorRegistry()
    made = Engine(
        bus,
        Scheduler(pool, limits),
        runner,
        name=name,
        served=SERVED,
        metrics=EngineMetrics(registry),
        tracer=tracer or NoOpTracer(),
        drain_seconds=drain_seconds,
        incarnation=incarnation,
    )
    runner.engine_stops = lambda: made.steps.is_stopping
    async with made.running():
        yield Running(made, runner, pool, registry)
        if drain_seconds:
            runner.allow()
