"""A service's life: what starts it, what stops it, and who is told.

Every `python -m services.<name>` is the same few lines:

    def main() -> None:
        run("gateway", GatewaySettings, serve)

where `serve` is an async context manager that enters the service's parts in order of need (what feeds before what is
fed) and yields once it is ready; leaving it drains in the opposite order. `run` enters it, waits for SIGTERM or SIGINT
and leaves it. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import structlog
import uvloop

from holdfast.errors import ConfigurationError, HoldfastError
from holdfast.settings import Settings, load
from holdfast.telemetry import configure_logs

S = TypeVar("S", bound=Settings)

log = structlog.get_logger(__name__)


def run(name: str, kind: type[S], serve: Callable[[S], AbstractAsyncContextManager[object]]) -> None:
    """Runs one service until a signal, as the whole program. Exits with 0 after a drain, with 2 and one line that says
    why where the service cannot start as configured, with 1 where it failed."""
    try:
        configure_logs(name)
        uvloop.run(_live(name, serve(load(kind, sys.argv[1:]))))
    except* ConfigurationError as group:
        sys.exit(_refusal(name, group, code=2))
    except* HoldfastError as group:
        sys.exit(_refusal(name, group, code=1))


async def _live(name: str, service: AbstractAsyncContextManager[object]) -> None:
    async with stop_signals() as stop, service:
        log.info("ready", service=name)
        await stop.wait()
        log.info("draining", service=name)
    log.info("stopped", service=name)


def _refusal(name: str, group: BaseExceptionGroup[HoldfastError], *, code: int) -> int:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - the last word of a program that cannot go on
    return code


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set. A second signal acts as if nobody had asked: it ends the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(each)
        stop.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal)
    try:
        yield stop
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
