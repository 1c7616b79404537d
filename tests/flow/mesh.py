"""The services together, for tests: in this process on either bus, or each in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import models, rpc
from holdfast.bus import Bus
from holdfast.client import Client
from holdfast.v1 import engine_pb2, engine_pb2_grpc
from services.engine.__main__ import serve as serve_engine
from services.engine.settings import EngineSettings
from services.gateway.__main__ import serve as serve_gateway
from services.gateway.settings import GatewaySettings
from services.tokenizer.__main__ import serve as serve_tokenizer
from services.tokenizer.settings import TokenizerSettings

ANYWHERE = "127.0.0.1:0"
PATIENCE = 120.0
"""Seconds that anything may take which is waited for."""


class Engine:
    """What an engine says about itself."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        self._stub = stub

    async def load(self) -> engine_pb2.GetLoadResponse:
        return await self._stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=PATIENCE)

    async def info(self) -> engine_pb2.GetInfoResponse:
        return await self._stub.GetInfo(engine_pb2.GetInfoRequest(), timeout=PATIENCE)

    async def until(self, holds: Callable[[engine_pb2.GetLoadResponse], bool]) -> engine_pb2.GetLoadResponse:
        """Asks again and again until the load is as wanted, and returns it."""
        async with asyncio.timeout(PATIENCE):
            while not holds(load := await self.load()):
                pass
        return load


def is_idle(load: engine_pb2.GetLoadResponse) -> bool:
    """No slot and no block is in use."""
    return load.num_running == load.num_waiting == load.num_active_blocks == 0


@dataclass(frozen=True, slots=True)
class Running:
    """A mesh that runs."""

    client: Client
    grpc: str
    http: str
    tokenizer: str
    engines: Sequence[Engine]

    @property
    def engine(self) -> Engine:
        (engine,) = self.engines
        return engine


@asynccontextmanager
async def running(
    open_bus: Callable[[], AbstractAsyncContextManager[Bus]],
    model: Path,
    *,
    gateway: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    num_engines: int = 1,
) -> AsyncIterator[Running]:
    """All services in this process, each with a connection of its own to the log; composed as their own programs do."""
    name = models.served_name(str(model))
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        settings = TokenizerSettings(model=str(model), served_model_name=name, address=ANYWHERE, threads=1)
        tokenizer = await enter(serve_tokenizer(settings))
        engines = []
        for number in range(num_engines):
            options: dict[str, Any] = {
                "model": str(model),
                "served_model_name": name,
                "name": f"engine-{number}",
                "address": ANYWHERE,
            }
            options |= {"drain_seconds": 0, "threads": 1, "device": "cpu", "cache_bytes": 64 << 20, **(engine or {})}
            served = await enter(serve_engine(EngineSettings(**options), bus=await enter(open_bus())))
            channel = await enter(rpc.channel(served.address))
            engines.append(Engine(engine_pb2_grpc.EngineServiceStub(channel)))
        options = {"address": ANYWHERE, "http_address": ANYWHERE, "tokenizer": tokenizer.address, "drain_seconds": 0}
        options |= gateway or {}
        front = await enter(serve_gateway(GatewaySettings(**options), bus=await enter(open_bus())))
        client = await enter(Client(front.grpc))
        yield Running(client=client, grpc=front.grpc, http=front.http, tokenizer=tokenizer.address, engines=engines)


class Process:
    """One service as a process of its own."""

    def __init__(self, name: str, child: asyncio.subprocess.Process) -> None:
        self.name = name
        self.child = child
        self.log: list[str] = []
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def addresses(self) -> dict[str, Any]:
        """What its log says when it is ready.

        Raises:
            RuntimeError: it ended before.
        """
        return await asyncio.wait_for(asyncio.shield(self._ready), PATIENCE)

    async def read(self) -> None:
        """Reads its log to the end."""
        assert self.child.stderr is not None
        while line := await self.child.stderr.readline():
            self.log.append(line.decode())
            if not self._ready.done() and line.startswith(b"{") and (event := json.loads(line))["event"] == "ready":
                self._ready.set_result(event)
        if not self._ready.done():
            self._ready.set_exception(RuntimeError("it ended before it was ready:\n" + "".join(self.log)))
            self._ready.exception()  # the test may be over, and nobody may ask

    def kill(self) -> None:
        """As a machine dies: at once, without a word to anybody."""
        self.child.kill()

    def freeze(self) -> None:
        """As a machine that is starved, or its memory swapped out: it does nothing, and knows nothing of it."""
        self.child.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """It goes on where it was."""
        self.child.send_signal(signal.SIGCONT)

    async def stop(self) -> int:
        """As an orchestrator stops it; its exit code."""
        self.child.terminate()
        return await asyncio.wait_for(self.child.wait(), PATIENCE)


@asynccontextmanager
async def process(name: str, /, **settings: object) -> AsyncIterator[Process]:
    """`command` as a process; killed, if it still runs, at the end of the block."""
    child = await asyncio.create_subprocess_exec(
        *command(name, **settings), stderr=asyncio.subprocess.PIPE, env=environment(), limit=1 << 20
    )
    running = Process(name, child)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(running.read())
            yield running
            if child.returncode is None:
                child.kill()
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
        print(f"--- {name}", *running.log, sep="\n", end="")  # pytest shows it where a test fails


def command(name: str = "", /, **settings: object) -> list[str]:
    """The program of one service, or of all in one process; or a program of the tests, by its whole name."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", name if "." in name else f"services.{name}".rstrip("."), *flags]


def environment() -> dict[str, str]:
    """Without what the machine's owner set for their own mesh; few threads, for there are many processes."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_") or "CACHE" in key}
    return ours | {"HOLDFAST_LOG_FORMAT": "json", "OMP_NUM_THREADS": "1"}
