"""A service's life: what starts it, what stops it, and who is told.

Every `python -m services.<name>` is the same few lines:

    def main() -> None:
        run("gateway", GatewaySettings, serve)

where `serve` is an async context manager that enters the service's parts in order of need (what feeds before what is
fed) and yields once it is ready; leaving it drains in the opposite order. `run` enters it, waits for SIGTERM or SIGINT
and leaves it; a signal that comes before the service is ready ends its start. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import functools
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import structlog
import uvloop

from holdfast.errors import CannotListen, ConfigurationError, HoldfastError
from holdfast.settings import Settings, flags_of, listening, load
from holdfast.telemetry import configure_logs

S = TypeVar("S", bound=Settings)
T = TypeVar("T")

log = structlog.get_logger(__name__)

_WHY = {
    errno.EADDRINUSE: "somebody else listens there",
    errno.EADDRNOTAVAIL: "it is no address of this host",
    errno.EACCES: "this user may not",
}


async def until_stopped(settings: Settings, parts: object, stop: asyncio.Event) -> None:
    """What a service does once it is ready: it serves until it is told to stop."""
    await stop.wait()


def run(
    name: str,
    kind: type[S],
    serve: Callable[[S], AbstractAsyncContextManager[T]],
    *,
    use: Callable[[S, T, asyncio.Event], Awaitable[None]] = until_stopped,
    log_level: str = "info",
) -> None:
    """Runs one service, as the whole program: enters `serve`, and leaves it when `use` returns, which is given the
    settings, what `serve` yields, and an event that a signal sets. Exits with 0 after a drain, with 2 and one line that
    says why where the service cannot start as configured, with 1 where it failed."""
    settings: S | None = None
    try:
        configure_logs(name, level=log_level)
        settings = load(kind, sys.argv[1:])
        for address in listening(settings):
            check_free(address)  # a start takes a while, and a server's own words for it are no help
        uvloop.run(_live(name, serve(settings), functools.partial(use, settings)))
    except* CannotListen as group:
        sys.exit(_refusal(name, group, code=2, remedy=_another_address(settings, group)))
    except* ConfigurationError as group:
        sys.exit(_refusal(name, group, code=2))
    except* HoldfastError as group:
        sys.exit(_refusal(name, group, code=1))


async def _live(
    name: str, service: AbstractAsyncContextManager[T], use: Callable[[T, asyncio.Event], Awaitable[None]]
) -> None:
    async with stop_signals() as stop, AsyncExitStack() as stack:
        try:
            async with _given_up_on(stop):
                parts = await stack.enter_async_context(service)
        except TimeoutError:
            log.info("stopped before it was ready", service=name)
            return
        log.info("ready", service=name, **_addresses(parts))
        await use(parts, stop)
        log.info("draining", service=name)
    log.info("stopped", service=name)


@asynccontextmanager
async def _given_up_on(stop: asyncio.Event) -> AsyncIterator[None]:
    """Ends what the block awaits, with TimeoutError, when `stop` is set."""
    async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as tasks:

        async def give_up() -> None:
            await stop.wait()
            limit.reschedule(0)

        waiting = tasks.create_task(give_up())
        try:
            yield
        finally:
            waiting.cancel()


def _addresses(parts: object) -> dict[str, object]:
    """What `serve` yields, for the log: the addresses that were really bound."""
    return dataclasses.asdict(parts) if dataclasses.is_dataclass(parts) and not isinstance(parts, type) else {}


def _refusal(name: str, group: BaseExceptionGroup[HoldfastError], *, code: int, remedy: str = "") -> int:
    print(f"{name}: {_first(group)}{remedy}", file=sys.stderr)  # noqa: T201 - the last word of a program that gives up
    return code


def _first(group: BaseExceptionGroup[HoldfastError]) -> HoldfastError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, HoldfastError)
    return error


def _another_address(settings: Settings | None, group: BaseExceptionGroup[CannotListen]) -> str:
    error = _first(group)
    assert isinstance(error, CannotListen)
    flags = flags_of(settings, error.address) if settings is not None else []
    return f"; choose another by {' or '.join(flags)}" if flags else ""


def check_free(address: str) -> None:
    """Raises CannotListen: nobody can listen on `host:port` now, or that is no such address. Port 0 is always free."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) >= 1 << 16:
        raise CannotListen(address, "it must be host:port, the port at most 65535")
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise CannotListen(address, "nobody knows that host") from error
    failures = [failure for family, *_, where in found if (failure := _failure_to_bind(family, where)) is not None]
    in_use = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
    if in_use or len(failures) == len(found):  # of a name with several addresses one may do
        first = (in_use or failures)[0]
        if first.errno in _WHY:  # what else there may be the server itself may know to help
            raise CannotListen(address, _WHY[first.errno]) from first


def _failure_to_bind(family: int, where: Any) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(where)
    except OSError as error:
        return error
    return None


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set. A second signal ends the process at once, by that signal."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(given: signal.Signals) -> None:
        if stop.is_set():
            loop.remove_signal_handler(given)
            signal.signal(given, signal.SIG_DFL)  # Python's own for SIGINT would only raise, and be drained again
            signal.raise_signal(given)
        stop.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal, each)
    try:
        yield stop
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
