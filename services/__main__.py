"""The whole mesh in one process: `python -m services`.

All four services, one event loop, the log in memory; the services still speak gRPC to each other, over loopback. With
`--ask "a question"` it asks itself through its own gateway, shows the answer as it grows, and says how to go on; that
is what `make run` does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported: its notes are not for people

from prometheus_client import CollectorRegistry

from holdfast import __version__, models
from holdfast.memory import MemoryBus
from holdfast.service import run
from services.ask import ask, how_to_go_on, served, unless_stopped
from services.gateway.__main__ import serve as serve_gateway
from services.kvstore.__main__ import serve as serve_kvstore
from services.settings import MeshSettings, refuse_what_is_decided_here
from services.tokenizer.__main__ import serve as serve_tokenizer

if TYPE_CHECKING:
    from services.engine.__main__ import EngineAddresses
    from services.engine.settings import EngineSettings

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where a running mesh listens, each as `host:port`."""

    grpc: str
    http: str
    tokenizer: str
    engine: str
    kvstore: str


@asynccontextmanager
async def serve(settings: MeshSettings, *, say: Say = lambda line: None) -> AsyncIterator[Mesh]:
    """All services, ready. `say` is told in lines what goes on. Leaving the block drains them, the gateway first.

    Raises:
        ConfigurationError: a part cannot start as configured.
    """
    refuse_what_is_decided_here(settings)
    say(f"Holdfast {__version__}: four services in one process, joined by a log in memory.")
    resolving = asyncio.to_thread(models.resolve, settings.model, progress=lambda line: say(f"  {line}"))
    folder = await _timed(say, f"model {settings.model}", resolving)
    name = settings.served_model_name or models.served_name(settings.model)
    model = {"model": str(folder), "served_model_name": name}
    registry = CollectorRegistry()  # one of all parts: the gateway shows it
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        bus = await enter(MemoryBus())
        tokenizer = await _timed(
            say, "tokenizer", enter(serve_tokenizer(settings.tokenizer.model_copy(update=model), registry=registry))
        )
        kvstore = await _timed(say, "KV store", enter(serve_kvstore(settings.kvstore, registry=registry)))
        at_store = model | {"kvstore": settings.engine.kvstore or kvstore.address}
        say("  engine: loading the model")
        engine = await _timed(say, "engine", enter(_engine(settings.engine.model_copy(update=at_store), bus, registry)))
        at_tokenizer = settings.gateway.model_copy(update={"tokenizer": tokenizer.address})
        gateway = await _timed(say, "gateway", enter(serve_gateway(at_tokenizer, bus=bus, registry=registry)))
        yield Mesh(
            grpc=gateway.grpc,
            http=gateway.http,
            tokenizer=tokenizer.address,
            engine=engine.address,
            kvstore=kvstore.address,
        )


@asynccontextmanager
async def _engine(
    settings: EngineSettings, bus: MemoryBus, registry: CollectorRegistry
) -> AsyncIterator[EngineAddresses]:
    # Imports torch, which takes seconds: not before the first line is printed.
    from services.engine.__main__ import serve as serve_engine

    async with serve_engine(settings, bus=bus, registry=registry) as addresses:
        yield addresses


async def _timed(say: Say, what: str, ready: Awaitable[T]) -> T:
    start = time.perf_counter()
    result = await ready
    say(f"  {what}: ready after {time.perf_counter() - start:.1f} s")
    return result


async def use(settings: MeshSettings, mesh: Mesh, stop: asyncio.Event) -> None:
    """Asks what is to be asked, then serves until it is told to stop, or ends at once where that is wanted: also where
    nothing was to be asked."""
    if settings.ask:
        await unless_stopped(ask(mesh.grpc, settings.ask), stop)
    ends = settings.exit if settings.exit is not None else bool(settings.ask) and not sys.stdin.isatty()
    if ends:
        why = "as asked" if settings.exit else "as nobody sits at a terminal; --no-exit keeps serving"
        print(f"\nEnding, {why}.", flush=True)
        return
    if not stop.is_set():
        parts = {"tokenizer": mesh.tokenizer, "engine": mesh.engine, "kvstore": mesh.kvstore}
        text = how_to_go_on(await served(mesh.grpc), grpc=mesh.grpc, http=mesh.http, parts=parts)
        print(text, "Ctrl-C ends it.", sep="\n", flush=True)
        await stop.wait()
    print("Draining; Ctrl-C again ends at once.", flush=True)


def main() -> None:
    """`python -m services`."""
    run("holdfast", MeshSettings, partial(serve, say=partial(print, flush=True)), use=use, log_level="warning")


if __name__ == "__main__":
    main()
