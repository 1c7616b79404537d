"""One HTTP call and its response, as a whole or as a stream of events, whatever it is about."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog
from opentelemetry.context import Context
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from holdfast.errors import (
    HoldfastError,
    InternalError,
    InvalidRequest,
    RequestTooSlow,
    RetryableError,
    Unavailable,
    wire,
)
from holdfast.telemetry import extract
from services.gateway.bodies import ClientLeft
from services.gateway.handover import HandedOver
from services.gateway.openai_reply import error_json
from services.gateway.tasks import running

log = structlog.get_logger(__name__)

CLIENTS_ID = re.compile(r"[!-~]{1,128}")
"""What a client may call its call, in x-request-id."""

BREAK_OFF = "holdfast.break_off"
"""The extension of a call's scope that closes its connection, behind what was written."""

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def error_response(error: HoldfastError, *, chat: bool = False, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal."""
    headers = dict(headers or {})
    if isinstance(error, RequestTooSlow):
        headers["connection"] = "close"  # what still comes is no call
    if isinstance(error, RetryableError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(error_json(error, chat=chat), status_code=wire(error).http, headers=headers)


class Exchange:
    """The response to one call: what was sent of it, and how to go on."""

    def __init__(self, scope: Scope, send: Send, request_id: str, *, chat: bool = False, native: bool = False) -> None:
        """`chat`: parameters are called as in the chat API. `native`: events have names, and the last one is no mark."""
        self.request_id = request_id
        """The mesh's."""
        self.clients_id = ""
        """What the client calls it, if it does."""
        self._scope = scope
        self._send = send
        self._chat = chat
        self._native = native
        self._streams = False
        self._has_cursor = False

    async def begin_stream(self) -> None:
        """The response is a stream of events."""
        self._streams = True
        headers = [*STREAM_HEADERS, *((name.encode(), value.encode()) for name, value in self._id.items())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(self, data: str, *, cursor: str = "", name: str = "") -> None:
        """An event. `cursor`: where its client stands after it. `name`: its kind, where there are several."""
        self._has_cursor = self._has_cursor or bool(cursor)
        mark = f"id: {cursor}\n" if cursor else ""
        kind = f"event: {name}\n" if name else ""
        await self.write(f"{mark}{kind}data: {data}\n\n")

    async def write(self, text: str) -> None:
        """More of a stream. Waits while the client has too much to read."""
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end_stream(self) -> None:
        """The end of a stream."""
        done = b"" if self._native else b"data: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": done, "more_body": False})

    async def respond_nothing(self) -> None:
        """There is nothing to respond, and no use in asking again."""
        await self._give(Response(status_code=204, headers=self._id))

    async def respond(self, body: object) -> None:
        """The response in one piece."""
        await self._give(JSONResponse(body, headers=self._id))

    async def refuse(self, error: HoldfastError) -> None:
        """The error: as the response, or where a stream has begun, as its last event. A stream that is handed over has none:
        its connection is closed behind the last event, within the body, so that whoever reads takes it for broken and
        not for complete; who knows how comes back with the last id, as a browser does by itself."""
        if isinstance(error, HandedOver) and self._has_cursor:
            self._scope["extensions"][BREAK_OFF]()
        elif self._streams:
            error_name = "error" if self._native else ""
            await self.event(json.dumps(error_json(error, chat=self._chat)), name=error_name)
            await self.end_stream()
        else:
            await self._give(error_response(error, chat=self._chat, headers=self._id))

    @property
    def _id(self) -> dict[str, str]:
        """The header that names the request; none where nobody knows one yet."""
        told = self.clients_id or self.request_id
        return {"x-request-id": told} if told else {}

    async def _give(self, response: Response) -> None:
        async def nothing() -> dict[str, str]:
            return {"type": "http.disconnect"}

        await response({"type": "http"}, nothing, self._send)


@asynccontextmanager
async def answering(exchange: Exchange) -> AsyncIterator[None]:
    """Whatever the block raises is the call's answer, if its client is there."""
    try:
        yield
    except ClientLeft:
        return
    except asyncio.CancelledError:  # by the server, at the end of its drain; the task ends here
        await exchange.refuse(Unavailable("the gateway is being stopped"))
    except HoldfastError as error:
        await exchange.refuse(error)
    except Exception as error:
        log.exception("unexpected error in a call", exc_info=error)
        await exchange.refuse(InternalError("internal error; the service's log has it"))


@asynccontextmanager
async def connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client leaves. What the block raises is raised as it is.

    Raises:
        ClientLeft: the client left.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientLeft

    async with running(watch()):
        yield


def headers_of(scope: Scope) -> dict[str, str]:
    """The call's headers, by their names in lower case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def trace_of(headers: Mapping[str, str]) -> Context:
    """The client's span."""
    return extract(tuple((name, value.encode("latin-1")) for name, value in headers.items()))


def read_clients_id(headers: Mapping[str, str]) -> str:
    """What the client calls its call, empty where it does not. Of no meaning to the mesh: two calls may have the same.

    Raises:
        InvalidRequest: it cannot be repeated in a header and a log.
    """
    given = headers.get("x-request-id", "")
    if given and not CLIENTS_ID.fullmatch(given):
        raise InvalidRequest("x-request-id must be 1 to 128 visible ASCII characters", field="x-request-id")
    return given
