"""One engine: `python -m services.engine`."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from holdfast import models, rpc
from holdfast.bus import Bus
from holdfast.errors import ConfigurationError
from holdfast.service import run
from holdfast.telemetry import metrics_server, tracing
from holdfast.topics import TOPICS
from holdfast.v1 import engine_pb2
from services.engine.blocks import BlockPool
from services.engine.build import Facts, build_apart, device_of
from services.engine.engine import Engine, running
from services.engine.identity import fingerprint, num_parameters
from services.engine.loop import Runner
from services.engine.metrics import EngineMetrics
from services.engine.models.spec import eos_token_ids
from services.engine.offload import Cache, StoreClient
from services.engine.ranks import group as ranks
from services.engine.scheduler import Limits, Scheduler
from services.engine.servicer import EngineServicer, servicer
from services.engine.settings import Capacity, EngineSettings
from services.engine.shard import Shard
from services.engine.validation import Served

CALL_GRACE_SECONDS = 1.0
"""How long calls may take once the engine is drained."""


@dataclass(frozen=True, slots=True)
class EngineAddresses:
    """Where a running engine listens."""

    address: str
    """`host:port` of the control service."""
    metrics_port: int
    """Port of `/metrics`; 0 where it is not served."""


@asynccontextmanager
async def serve(
    settings: EngineSettings, *, bus: Bus | None = None, registry: CollectorRegistry | None = None
) -> AsyncIterator[EngineAddresses]:
    """An engine that is ready: the model is loaded and both groups gave it its share. Leaving the block lets what runs
    come to its end for `drain_seconds`; what is left then is another engine's.

    Raises:
        ConfigurationError: the settings do not fit the model or the machine, or an address cannot be bound.
        Unavailable: the log cannot be reached.
        InternalError: (from the block) the step thread failed, or a rank did.
    """
    capacity = settings.capacity(device_of(settings, Shard(count=settings.tensor_parallel)).type)
    limits = _limits(settings, capacity)
    folder = await asyncio.to_thread(models.resolve, settings.model, weights=settings.load_format != "dummy")
    name = settings.name or f"{socket.gethostname()}-{os.getpid()}"
    registry = registry or CollectorRegistry()
    metrics = EngineMetrics(registry)
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        facts, runner, cache = await enter(_computing(settings, folder))
        served = _served(settings, folder, facts)
        namespace = await asyncio.to_thread(_namespace, settings, folder, facts)
        tracer = parts.enter_context(tracing("engine"))
        metrics_port = await enter(metrics_server(settings.metrics_address, registry))
        joined = bus if bus is not None else await enter(_kafka(settings))
        await joined.create_topics(TOPICS)
        store = StoreClient(settings.kvstore, cache, namespace=namespace, metrics=metrics)
        engine = Engine(
            joined,
            Scheduler(_pool(settings, facts, namespace), replace(limits, lookahead=facts.lookahead)),
            runner,
            name=name,
            served=served,
            incarnation=settings.incarnation,
            drain_seconds=settings.drain_seconds,
            store=(store, cache) if settings.kvstore else None,
            metrics=metrics,
            tracer=tracer,
        )
        implementation = EngineServicer(
            _info(settings, folder, facts, name=name, served=served, limits=limits),
            load=lambda: engine.steps.load,
            is_draining=lambda: engine.intake.is_draining,
            drain=engine.intake.drain,
        )
        server = await enter(rpc.serving(settings.address, [servicer(implementation)], drain=CALL_GRACE_SECONDS))
        async with running(store.run()) if settings.kvstore else nullcontext(), engine.running():
            await server.health.ready()
            yield EngineAddresses(address=server.address, metrics_port=metrics_port)
            await server.health.not_ready()


@asynccontextmanager
async def _computing(settings: EngineSettings, folder: Path) -> AsyncIterator[tuple[Facts, Runner[Any], Cache]]:
    """What computes steps, and where it keeps keys and values: in the step thread, or in a process for each rank."""
    if settings.tensor_parallel == 1:
        computer = await build_apart(settings, folder)
        yield computer.facts, computer.runner, computer.cache
    else:
        async with ranks.started(settings, folder) as group:
            yield group.facts, group, group


def _limits(settings: EngineSettings, capacity: Capacity) -> Limits:
    try:
        return Limits(
            max_sequences=capacity.max_sequences,
            max_step_tokens=capacity.max_step_tokens,
            itl_target=settings.itl_target_ms / 1000,
            economy=settings.economy_targets(),
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _kafka(settings: EngineSettings) -> Any:
    # aiokafka is no part of an engine that is given its log.
    from holdfast.kafka import KafkaBus

    client_id = f"engine-{settings.name or os.getpid()}"
    return KafkaBus(settings.kafka, client_id=client_id, namespace=settings.kafka_namespace)


def _namespace(settings: EngineSettings, folder: Path, facts: Facts) -> bytes:
    """Names all that the keys and values of a token depend on beside the tokens up to it, and how they lie in a block. Only
    a store that others use too makes it worth while to read all the weights."""
    is_shared = bool(settings.kvstore) and settings.load_format != "dummy"
    computed = (
        settings.load_format,
        fingerprint(folder, weights=is_shared),
        facts.implementation,
        settings.quantization,
        settings.deterministic,
        facts.layout,
        settings.tensor_parallel,
        facts.device,
        sys.byteorder,
    )
    return sha256(repr(computed).encode()).digest()


def _served(settings: EngineSettings, folder: Path, facts: Facts) -> Served:
    return Served(
        model=settings.served_model_name or models.served_name(settings.model),
        context_length=facts.max_model_len,
        vocab_size=facts.vocab_size,
        stop_token_ids=eos_token_ids(folder),
    )


def _pool(settings: EngineSettings, facts: Facts, namespace: bytes) -> BlockPool:
    return BlockPool(
        facts.num_blocks,
        block_size=facts.layout.block_size,
        salt=namespace,
        keeps_prefixes=settings.prefix_cache,
    )


def _info(
    settings: EngineSettings, folder: Path, facts: Facts, *, name: str, served: Served, limits: Limits
) -> engine_pb2.GetInfoResponse:
    return engine_pb2.GetInfoResponse(
        engine=name,
        model=served.model,
        context_length=served.context_length,
        max_sequences=limits.max_sequences,
        block_size=facts.layout.block_size,
        num_blocks=facts.num_blocks,
        device=facts.device,
        dtype=str(facts.layout.shape.dtype).removeprefix("torch."),
        num_parameters=num_parameters(folder),
        kv_cache_dtype=settings.kv_cache_dtype,
        quantization=settings.quantization,
        tensor_parallel=settings.tensor_parallel,
    )


def main() -> None:
    """`python -m services.engine`."""
    run("engine", EngineSettings, serve)


if __name__ == "__main__":
    main()
