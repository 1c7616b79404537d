"""One engine: `python -m services.engine`."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from holdfast import models, rpc
from holdfast.bus import Bus, TopicPartition
from holdfast.errors import ConfigurationError
from holdfast.service import run
from holdfast.telemetry import metrics_server, tracing
from holdfast.topics import TOPICS
from holdfast.v1 import engine_pb2
from services.engine.blocks import BlockPool
from services.engine.build import Computer, build
from services.engine.commits import Commits
from services.engine.emit import Emitter
from services.engine.identity import fingerprint, num_parameters
from services.engine.intake import Intake
from services.engine.loop import StepLoop
from services.engine.metrics import EngineMetrics
from services.engine.model_runner import Launched
from services.engine.models.spec import eos_token_ids
from services.engine.offload import StoreClient
from services.engine.requests import Requests
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import News
from services.engine.servicer import EngineServicer, servicer
from services.engine.settings import EngineSettings
from services.engine.validation import Served

CALL_GRACE_SECONDS = 1.0
"""How long calls may take once the engine is drained."""

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineAddresses:
    """Where a running engine listens."""

    address: str
    """`host:port` of the control service."""
    metrics_port: int
    """Port of `/metrics`; 0 where it is not served."""


@asynccontextmanager
async def serve(settings: EngineSettings, *, bus: Bus | None = None) -> AsyncIterator[EngineAddresses]:
    """An engine that is ready: the model is loaded and both groups gave it its share. Leaving the block lets what runs
    come to its end for `drain_seconds`; what is left then is another engine's.

    Raises:
        ConfigurationError: the settings do not fit the model or the machine, or an address cannot be bound.
        Unavailable: the log cannot be reached.
        InternalError: (from the block) the step thread failed.
    """
    limits = _limits(settings)
    folder = await asyncio.to_thread(models.resolve, settings.model, weights=settings.load_format != "dummy")
    computer = await asyncio.to_thread(build, settings, folder)
    registry = CollectorRegistry()
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        tracer = parts.enter_context(tracing("engine"))
        metrics_port = await enter(metrics_server(settings.metrics_address, registry))
        joined = bus if bus is not None else await enter(_kafka(settings))
        await joined.create_topics(TOPICS)
        engine = Engine(settings, folder, computer, limits, joined, metrics=EngineMetrics(registry), tracer=tracer)
        server = await enter(rpc.serving(settings.address, [servicer(engine.servicer)], drain=CALL_GRACE_SECONDS))
        async with engine.running():
            await server.health.ready()
            yield EngineAddresses(address=server.address, metrics_port=metrics_port)
            await server.health.not_ready()


class Engine:
    """The parts of an engine, handed to one another."""

    def __init__(
        self,
        settings: EngineSettings,
        folder: Path,
        computer: Computer,
        limits: Limits,
        bus: Bus,
        *,
        metrics: EngineMetrics,
        tracer: Tracer,
    ) -> None:
        name = settings.name or f"{socket.gethostname()}-{os.getpid()}"
        served = Served(
            model=settings.served_model_name or models.served_name(settings.model),
            context_length=computer.max_model_len,
            vocab_size=computer.model.vocab_size,
            stop_token_ids=eos_token_ids(folder),
        )
        namespace = _namespace(settings, folder, computer)
        pool = BlockPool(
            computer.cache.num_blocks,
            block_size=settings.block_size,
            salt=namespace,
            keeps_prefixes=settings.prefix_cache,
        )
        self._drain_seconds = settings.drain_seconds
        self._store = (
            StoreClient(settings.kvstore, computer.cache, namespace=namespace, metrics=metrics)
            if settings.kvstore
            else None
        )
        epochs: dict[TopicPartition, int] = {}
        commits = Commits()
        requests = Requests(commits)
        self._emitter = Emitter(bus, requests, engine=name, epoch_of=epochs.get, metrics=metrics, tracer=tracer)
        self._steps: StepLoop[Launched] = StepLoop(
            Scheduler(pool, limits),
            computer.runner,
            deliver=self._deliver,
            metrics=metrics,
            store=(self._store, computer.cache) if self._store is not None else None,
        )
        self._intake = Intake(
            bus,
            requests,
            self._emitter,
            self._steps,
            served=served,
            commits=commits,
            epochs=epochs,
            metrics=metrics,
            max_sequences=limits.max_sequences,
            batch_share=limits.batch_share,
            incarnation=settings.incarnation,
        )
        self.servicer = EngineServicer(
            _info(settings, name, served, computer, folder),
            load=lambda: self._steps.load,
            is_draining=lambda: self._intake.is_draining,
            drain=self._intake.drain,
        )
        metrics.watch(
            running=lambda: self._steps.load.num_running,
            waiting=lambda: self._steps.load.num_waiting,
            usage=lambda: self._steps.load.num_active_blocks / pool.num_blocks,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine at work, from the moment it owns its share of the requests. Leaving the block drains it."""
        async with self._steps.running(), asyncio.TaskGroup() as tasks:
            parts: list[Coroutine[Any, Any, None]] = [self._steps.watch(), self._emitter.run(), self._intake.run()]
            if self._store is not None:
                parts.append(self._store.run())
            running = [tasks.create_task(part) for part in parts]
            await self._intake.until_joined()
            yield
            await self._drain()
            for each in running:
                each.cancel()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._intake.drain()
        except TimeoutError:
            log.info("what is left is another engine's", seconds=self._drain_seconds)
            await self._intake.commit()

    def _deliver(self, news: list[News]) -> None:
        self._emitter.deliver(news, confirmed=self._steps.told)


def _limits(settings: EngineSettings) -> Limits:
    try:
        return Limits(
            max_sequences=settings.max_sequences,
            max_step_tokens=settings.max_step_tokens,
            itl_target=settings.itl_target_ms / 1000,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _kafka(settings: EngineSettings) -> Any:
    # aiokafka is no part of an engine that is given its log.
    from holdfast.kafka import KafkaBus

    client_id = f"engine-{settings.name or os.getpid()}"
    return KafkaBus(settings.kafka, client_id=client_id, namespace=settings.kafka_namespace)


def _namespace(settings: EngineSettings, folder: Path, computer: Computer) -> bytes:
    """Names all that the keys and values of a token depend on beside the tokens up to it, and how they lie in a block."""
    weights = "dummy" if settings.load_format == "dummy" else fingerprint(folder).hex()
    computed = (weights, computer.model.kv_shape, settings.block_size, computer.device.type, sys.byteorder)
    return sha256(repr(computed).encode()).digest()


def _info(
    settings: EngineSettings, name: str, served: Served, computer: Computer, folder: Path
) -> engine_pb2.GetInfoResponse:
    return engine_pb2.GetInfoResponse(
        engine=name,
        model=served.model,
        context_length=served.context_length,
        max_sequences=settings.max_sequences,
        block_size=settings.block_size,
        num_blocks=computer.cache.num_blocks,
        device=computer.device.type,
        dtype=str(computer.model.kv_shape.dtype).removeprefix("torch."),
        num_parameters=num_parameters(folder),
    )


def main() -> None:
    """`python -m services.engine`."""
    run("engine", EngineSettings, serve)


if __name__ == "__main__":
    main()
