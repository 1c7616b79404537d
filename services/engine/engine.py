"""An engine without its model: what lies between the log and the runner, handed to one another and run together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, TypeVar

import structlog
from opentelemetry.trace import Tracer

from holdfast.bus import Bus
from services.engine.commits import Commits
from services.engine.dead import DeadLetters
from services.engine.emit import Emitter
from services.engine.intake import Intake
from services.engine.loop import Runner, StepLoop
from services.engine.metrics import EngineMetrics
from services.engine.offload import Cache, Store
from services.engine.requests import Requests
from services.engine.scheduler import Scheduler
from services.engine.sequence import FinishReason, News
from services.engine.takeover import Takeover
from services.engine.validation import Served

L = TypeVar("L")

log = structlog.stdlib.get_logger(__name__)


class Engine(Generic[L]):
    """The parts between the log and the runner, handed to one another."""

    def __init__(
        self,
        bus: Bus,
        scheduler: Scheduler,
        runner: Runner[L],
        *,
        name: str,
        served: Served,
        metrics: EngineMetrics,
        tracer: Tracer,
        incarnation: int = 0,
        drain_seconds: float = 0.0,
        store: tuple[Store, Cache] | None = None,
    ) -> None:
        """`store`: where prefixes are looked for and kept that the engine itself has no room for."""
        commits = Commits()
        self.requests = Requests(commits)
        self._drain_seconds = drain_seconds
        self._takeover = Takeover(bus, engine=name, outbid=lambda source: self.intake.leave(source))
        self._emitter = Emitter(
            bus, self.requests, engine=name, epoch_of=self._takeover.epoch_of, metrics=metrics, tracer=tracer
        )
        self._dead_letters = DeadLetters(
            bus,
            engine=name,
            end=lambda request, error: self._emitter.refuse(request, FinishReason.ERROR, error),
            metrics=metrics,
        )
        self.steps = StepLoop(scheduler, runner, deliver=self._deliver, metrics=metrics, store=store)
        self.intake = Intake(
            bus,
            self.requests,
            self._emitter,
            self.steps,
            served=served,
            commits=commits,
            takeover=self._takeover,
            dead_letters=self._dead_letters,
            metrics=metrics,
            max_sequences=scheduler.limits.max_sequences,
            batch_share=scheduler.limits.batch_share,
            incarnation=incarnation,
        )
        metrics.watch(
            running=lambda: self.steps.load.num_running,
            waiting=lambda: self.steps.load.num_waiting,
            usage=lambda: self.steps.load.num_active_blocks / scheduler.pool.num_blocks,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine at work, from the moment it owns its share of the requests. Leaving the block drains it."""
        async with self.steps.running(), self._at_work():
            await self.intake.until_joined()
            yield
            await self._drain()

    def _at_work(self) -> AbstractAsyncContextManager[None]:
        return running(
            self.steps.watch(), self._emitter.run(), self._takeover.run(), self._dead_letters.run(), self.intake.run()
        )

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self.intake.drain()
        except TimeoutError:
            log.info("what is left is another engine's", seconds=self._drain_seconds)
            await self.intake.leave_rest()

    def _deliver(self, news: list[News]) -> None:
        self._emitter.deliver(news, confirmed=self.steps.told)


@asynccontextmanager
async def running(*parts: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs these beside the block, and ends them with it. Where one fails the block is cancelled."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(part) for part in parts]
        yield
        for each in running:
            each.cancel()
