"""Whole meshes for a benchmark: in one process, or each service in its own on a real Kafka broker.

They run as a user runs them, `python -m services...`, on free ports, and end with the block that opened them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
ANYWHERE = "127.0.0.1:0"
START_SECONDS = 300.0
STOP_SECONDS = 60.0


class MeshError(Exception):
    """A part of the mesh did not start; the text has what it said."""


@asynccontextmanager
async def embedded(model: Path, engine: Mapping[str, object]) -> AsyncIterator[str]:
    """All services in one process, the log in memory. Yields the gateway's address."""
    settings = {f"engine.{name}": value for name, value in engine.items()}
    settings |= {"model": model, "gateway.address": ANYWHERE, "gateway.http_address": ANYWHERE}
    async with service("services", settings) as ready:
        yield ready["grpc"]


@asynccontextmanager
async def on_kafka(model: Path, engine: Mapping[str, object]) -> AsyncIterator[str]:
    """A broker, a tokenizer, an engine and a gateway, each its own process. Yields the gateway's address."""
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        kafka = await enter(broker())
        tokenizer = await enter(service("services.tokenizer", {"model": model, "address": ANYWHERE}))
        await enter(service("services.engine", {"model": model, "address": ANYWHERE, "kafka": kafka, **engine}))
        settings = {"address": ANYWHERE, "http_address": ANYWHERE, "kafka": kafka, "tokenizer": tokenizer["address"]}
        gateway = await enter(service("services.gateway", settings))
        yield gateway["grpc"]


@asynccontextmanager
async def broker() -> AsyncIterator[str]:
    """A Kafka broker with records of its own. Yields its `host:port`.

    Raises:
        MeshError: there is no Java or no Maven, or it does not start.
    """
    command = [sys.executable, str(ROOT / "deploy" / "kafka" / "broker.py"), "run"]
    async with child(command, output="stdout") as process:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            address = (await process.stdout.readline()).decode().strip()
        if not address:
            raise MeshError("the broker did not start")
        yield address


@asynccontextmanager
async def service(module: str, settings: Mapping[str, object]) -> AsyncIterator[dict[str, Any]]:
    """A service that is ready, and what its log said then: its addresses.

    Raises:
        MeshError: it ended before.
    """
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    async with child([sys.executable, "-m", module, *flags], output="stderr") as process, asyncio.TaskGroup() as tasks:
        assert process.stderr is not None
        async with asyncio.timeout(START_SECONDS):
            ready = await until_ready(process.stderr, module)
        reading = tasks.create_task(read_on(process.stderr))
        try:
            yield ready
        finally:
            reading.cancel()


async def until_ready(log: asyncio.StreamReader, module: str) -> dict[str, Any]:
    lines = []
    async for line in log:
        lines.append(line.decode(errors="replace"))
        if (event := ready_event(line)) is not None:
            return event
    raise MeshError(f"{module} ended before it was ready:\n{''.join(lines[-20:])}")


def ready_event(line: bytes) -> dict[str, Any] | None:
    """What a line of a service's log says, if it is that the service is ready."""
    try:
        event = json.loads(line)
    except ValueError:  # a library's, or what a program says that gives up
        return None
    return event if isinstance(event, dict) and event.get("event") == "ready" else None


async def read_on(log: asyncio.StreamReader) -> None:
    """Keeps the pipe empty, so that a service that logs much does not wait for us."""
    while await log.readline():
        pass


@asynccontextmanager
async def child(command: list[str], *, output: Literal["stdout", "stderr"]) -> AsyncIterator[subprocess.Process]:
    """A program of whose outputs this one is ours to read; told to stop when the block is left."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env=environment(),
        limit=1 << 20,
        stdout=subprocess.PIPE if output == "stdout" else subprocess.DEVNULL,
        stderr=subprocess.PIPE if output == "stderr" else None,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.communicate(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


def environment() -> dict[str, str]:
    """Ours, without what was set for another mesh."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_") or "CACHE" in name}
    return kept | {"HOLDFAST_LOG_FORMAT": "json", "HOLDFAST_LOG_LEVEL": "info"}
