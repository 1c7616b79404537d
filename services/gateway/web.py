"""The HTTP server: uvicorn, with connections that do not wait for a client for ever."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from holdfast.errors import CannotListen
from services.gateway.exchange import BREAK_OFF
from services.gateway.tasks import unwrapped

log = structlog.get_logger(__name__)

SEND_BUFFER_BYTES = 1 << 18
"""What the kernel holds for a connection whose client does not read. Left to itself it takes megabytes, which a slow
client reads much later, and nobody notices that it is slow."""

LAST_WORDS_SECONDS = 1.0
"""How long calls that are ended may take to say so. Connections whose clients do not read them are cut then."""


@dataclass(frozen=True, slots=True)
class Site:
    """A server that runs."""

    address: str
    """`host:port`, the port that was really bound."""
    take_no_more: Callable[[], None]
    """From now on nobody can connect, and a connection ends with its call."""


@asynccontextmanager
async def serving(address: str, app: ASGIApp, *, drain: float, write_seconds: float) -> AsyncIterator[Site]:
    """An HTTP server on `host:port` (port 0: any). A client that for `write_seconds` does not take what is written for it
    loses its connection. Leaving the block takes no new connections, lets running calls end for at most `drain` seconds
    and cancels what is left.

    Raises:
        CannotListen: the address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    try:
        listener = socket.create_server(
            (host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except (OSError, ValueError, OverflowError) as error:
        raise CannotListen(address) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit it
    config = uvicorn.Config(
        app,
        http=functools.partial(_Connection, write_seconds=write_seconds),  # type: ignore[arg-type]  # it is called
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
    )
    server = _Server(config)
    with listener, unwrapped():
        async with asyncio.TaskGroup() as group:
            life = group.create_task(server.serve(sockets=[listener]))
            try:
                yield Site(f"{host}:{listener.getsockname()[1]}", server.take_no_more)
            finally:
                await _leave(server, life, drain)


async def _leave(server: _Server, life: asyncio.Task[None], drain: float) -> None:
    """Ends the server's life."""
    server.should_exit = True
    await asyncio.wait([life], timeout=drain)
    server.cancel_calls()
    await asyncio.wait([life], timeout=LAST_WORDS_SECONDS)
    server.cut_connections()


class _Server(uvicorn.Server):
    """A server that leaves the process's signals alone: whoever runs the service handles them. Its drain has no limit of
    its own: uvicorn's would log an error where there is none."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    def take_no_more(self) -> None:
        """As it does itself a moment after `should_exit`."""
        for listener in self.servers:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()

    def cancel_calls(self) -> None:
        """Ends what runs; each call answers that as it can."""
        for call in self.server_state.tasks:
            call.cancel()

    def cut_connections(self) -> None:
        """Ends what is left, though something should wait to be read."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


class _Connection(HttpToolsProtocol):
    """A connection that is cut where its client does not read. The call on it learns that the client has left."""

    def __init__(self, *given: Any, write_seconds: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._write_seconds = write_seconds
        self._limit: asyncio.TimerHandle | None = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {BREAK_OFF: self._break_off}  # type: ignore[dict-item]  # extensions are anybody's

    def pause_writing(self) -> None:
        """More waits for the client than is kept for it."""
        super().pause_writing()
        self._limit = self.loop.call_later(self._write_seconds, self._cut)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._forget_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_limit()

    def _break_off(self) -> None:
        self.cycle.disconnected = True  # for uvicorn the client has left, and the response need not end
        self.cycle.message_event.set()
        self.transport.close()

    def _forget_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _cut(self) -> None:
        log.warning("a client does not read; its connection is cut", seconds=self._write_seconds)
        self.transport.abort()
