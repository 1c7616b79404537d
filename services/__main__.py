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
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported: its notes are not for people

from pydantic import Field

from holdfast import __version__, models
from holdfast.errors import ConfigurationError
from holdfast.memory import MemoryBus
from holdfast.service import run
from holdfast.settings import Settings
from services.ask import ask, how_to_go_on, unless_stopped
from services.engine.settings import EngineSettings
from services.gateway.__main__ import serve as serve_gateway
from services.gateway.settings import GatewaySettings
from services.kvstore.__main__ import serve as serve_kvstore
from services.kvstore.settings import KVStoreSettings
from services.tokenizer.__main__ import serve as serve_tokenizer
from services.tokenizer.settings import TokenizerSettings

if TYPE_CHECKING:
    from services.engine.__main__ import EngineAddresses

Say = Callable[[str], None]
S = TypeVar("S", bound=Settings)
T = TypeVar("T")

_DECIDED_HERE = {
    "gateway": ("kafka", "kafka_namespace", "tokenizer"),
    "tokenizer": ("model", "served_model_name"),
    "engine": ("model", "served_model_name", "kafka", "kafka_namespace"),
}
"""Settings of the parts that follow from being in one process."""


class MeshSettings(Settings, env_prefix="HOLDFAST_"):
    """All services in one process."""

    model: str = "smollm2-135m-instruct"
    """What tokenizer and engine serve: a folder, a name known to `holdfast pull`, or a hub id."""
    served_model_name: str = ""
    """The name that requests use; empty for the last part of `model`."""
    ask: str = ""
    """A question to ask once all is ready; empty for none."""
    exit: bool | None = None
    """Whether to end after the answer to `ask`; by default only where standard input is no terminal."""

    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    """The gateway."""
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    """The tokenizer. Its address is any free port unless it is set."""
    engine: EngineSettings = Field(default_factory=EngineSettings)
    """The engine. Its address is any free port unless it is set; its KV store is the one here, unless it names one."""
    kvstore: KVStoreSettings = Field(default_factory=lambda: KVStoreSettings(capacity_bytes=1 << 30))
    """The KV store. Its address is any free port unless it is set."""


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
    _refuse_what_is_decided_here(settings)
    say(f"Holdfast {__version__}: four services in one process, joined by a log in memory.")
    resolving = asyncio.to_thread(models.resolve, settings.model, progress=lambda line: say(f"  {line}"))
    folder = await _timed(say, f"model {settings.model}", resolving)
    name = settings.served_model_name or models.served_name(settings.model)
    model = {"model": str(folder), "served_model_name": name}
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        bus = await enter(MemoryBus())
        tokenizer = await _timed(say, "tokenizer", enter(serve_tokenizer(_placed(settings.tokenizer, **model))))
        kvstore = await _timed(say, "KV store", enter(serve_kvstore(_placed(settings.kvstore))))
        store = settings.engine.kvstore or kvstore.address
        say("  engine: loading the model")
        engine = await _timed(say, "engine", enter(_engine(_placed(settings.engine, kvstore=store, **model), bus)))
        at_tokenizer = settings.gateway.model_copy(update={"tokenizer": tokenizer.address})
        gateway = await _timed(say, "gateway", enter(serve_gateway(at_tokenizer, bus=bus)))
        yield Mesh(
            grpc=gateway.grpc,
            http=gateway.http,
            tokenizer=tokenizer.address,
            engine=engine.address,
            kvstore=kvstore.address,
        )


def _refuse_what_is_decided_here(settings: MeshSettings) -> None:
    for part, names in _DECIDED_HERE.items():
        for name in names:
            if name in getattr(settings, part).model_fields_set:
                what = "set it without the part's name" if "model" in name else "it means nothing in one process"
                raise ConfigurationError(f"{part}.{name} cannot be set here: {what}")


def _placed(settings: S, **more: Any) -> S:
    """The settings of a part, on any free port unless they name one."""
    address = {} if "address" in settings.model_fields_set else {"address": "127.0.0.1:0"}
    return settings.model_copy(update=address | more)


@asynccontextmanager
async def _engine(settings: EngineSettings, bus: MemoryBus) -> AsyncIterator[EngineAddresses]:
    # Imports torch, which takes seconds: not before the first line is printed.
    from services.engine.__main__ import serve as serve_engine

    async with serve_engine(settings, bus=bus) as addresses:
        yield addresses


async def _timed(say: Say, what: str, ready: Awaitable[T]) -> T:
    start = time.perf_counter()
    result = await ready
    say(f"  {what}: ready after {time.perf_counter() - start:.1f} s")
    return result


async def use(settings: MeshSettings, mesh: Mesh, stop: asyncio.Event) -> None:
    """Asks what is to be asked, then serves until it is told to stop, or ends at once where that is wanted."""
    if settings.ask:
        await unless_stopped(ask(mesh.grpc, settings.ask), stop)
        ends = settings.exit if settings.exit is not None else not sys.stdin.isatty()
        if ends:
            why = "as asked" if settings.exit else "as nobody sits at a terminal; --no-exit keeps serving"
            print(f"\nEnding, {why}.", flush=True)
            return
    if not stop.is_set():
        model = settings.served_model_name or models.served_name(settings.model)
        print(how_to_go_on(mesh.grpc, mesh.http, model), "Ctrl-C ends it.", sep="\n", flush=True)
        await stop.wait()
    print("Draining; Ctrl-C again ends at once.", flush=True)


def main() -> None:
    """`python -m services`."""
    run("holdfast", MeshSettings, partial(serve, say=partial(print, flush=True)), use=use, log_level="warning")


if __name__ == "__main__":
    main()
