"""The HTTP face: the OpenAI API, health and metrics.

Token streams are written to the ASGI `send` directly, from templates. A client that leaves - while its prompt is read,
computed, or its answer written, streamed or not - cancels its request, unless it asked otherwise for a stream that it
could go on with.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import NamedTuple

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from holdfast import __version__
from holdfast.errors import (
    HoldfastError,
    InvalidRequest,
    NotFound,
)
from holdfast.events import Finished
from services.gateway.answer import Answer
from services.gateway.bodies import Bodies
from services.gateway.choice import SpelledTokens
from services.gateway.cursor import Cursor
from services.gateway.exchange import (
    Exchange,
    answering,
    connected,
    error_response,
    headers_of,
    read_clients_id,
    trace_of,
)
from services.gateway.generate import Call, Gateway
from services.gateway.handover import Moves
from services.gateway.http_resume import Resume
from services.gateway.metrics import Metrics
from services.gateway.openai import Asked, Value, read_chat, read_completion, read_json
from services.gateway.openai_reply import (
    ChatReply,
    CompletionReply,
    Ledger,
    Reply,
    Whole,
    finish_reason,
    model_json,
    models_json,
    spelled_logprobs,
)
from services.gateway.readiness import Readiness
from services.gateway.settings import GatewaySettings
from services.gateway.tasks import all_of

log = structlog.get_logger(__name__)


class Face(NamedTuple):
    """One of the two routes that generate."""

    path: str
    prefix: str
    """With which the ids of its requests begin."""


CHATS = Face("/v1/chat/completions", "chatcmpl-")
COMPLETIONS = Face("/v1/completions", "cmpl-")


def application(gateway: Gateway, readiness: Readiness, metrics: Metrics, settings: GatewaySettings) -> Starlette:
    """All routes."""
    bodies = Bodies(max_bytes=settings.max_reading_bytes, seconds=settings.read_seconds)
    chats, completions = (Completions(gateway, read, bodies, settings) for read in (read_chat, read_completion))

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        missing = readiness.missing
        return JSONResponse({"ready": not missing, "missing": missing}, status_code=503 if missing else 200)

    async def exposition(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def version(request: Request) -> Response:
        return JSONResponse({"name": "holdfast", "version": __version__})

    async def models(request: Request) -> Response:
        return JSONResponse(models_json(gateway.models()))

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        for each in gateway.models():
            if each.name == name:
                return JSONResponse(model_json(each))
        raise NotFound(f"no model {name!r} here; /v1/models lists those there are")

    return Starlette(
        routes=[
            Route(CHATS.path, chats, methods=["POST"]),
            Route(COMPLETIONS.path, completions, methods=["POST"]),
            Route("/v1/resume", Resume(gateway, settings), methods=["GET"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", exposition),
            Route("/version", version),
        ],
        exception_handlers={HoldfastError: _refused, HTTPException: _not_routed},
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HoldfastError)
    return error_response(error)


async def _not_routed(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "no_such_route"}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


class Completions:
    """One of the two routes that generate: an ASGI application."""

    def __init__(
        self,
        gateway: Gateway,
        read: Callable[[Mapping[str, Value], int], Asked],
        bodies: Bodies,
        settings: GatewaySettings,
    ) -> None:
        self._gateway = gateway
        self._read = read
        self._bodies = bodies
        self._chat = read is read_chat
        self._keepalive = settings.keepalive_seconds
        self._seconds_in_one_piece = settings.http_timeout_seconds or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        request_id = f"{(CHATS if self._chat else COMPLETIONS).prefix}{uuid.uuid4().hex}"
        exchange = Exchange(scope, send, request_id, chat=self._chat)
        async with answering(exchange):
            exchange.clients_id = read_clients_id(headers)
            asked = await self._asked(receive, headers)
            async with connected(receive):
                if cursor := headers.get("last-event-id"):
                    await self._resume(exchange, asked, headers, cursor)
                else:
                    await self._serve(exchange, asked, headers)

    async def _asked(self, receive: Receive, headers: Mapping[str, str]) -> Asked:
        body = await self._bodies.read(receive, headers)
        return self._read(read_json(body), self._gateway.models()[0].context_length)

    async def _serve(self, exchange: Exchange, asked: Asked, headers: Mapping[str, str]) -> None:
        context = trace_of(headers)
        async with AsyncExitStack() as stack:
            answers = []
            for index, request in enumerate(asked.requests):
                request.request_id = (
                    exchange.request_id if len(asked.requests) == 1 else f"{exchange.request_id}-{index}"
                )
                call = Call(
                    "http",
                    time_left=None if asked.stream else self._seconds_in_one_piece,
                    trace=context,
                    spelled=True,
                    clients_id=exchange.clients_id,
                    default_max_tokens=asked.default_max_tokens,
                    moves=Moves.LATE if asked.has_cursors else Moves.NEVER,
                )
                answers.append(await stack.enter_async_context(self._gateway.generate(request, call)))
            reply = self._reply(exchange, asked)
            if asked.stream:
                await Streamed(exchange, asked, answers, reply, keepalive=self._keepalive).write()
            else:
                await InOnePiece(exchange, asked, answers, reply).write()

    async def _resume(self, exchange: Exchange, asked: Asked, headers: Mapping[str, str], cursor: str) -> None:
        """The rest of an earlier stream. Of the call itself only `stream` and `stream_options` count: the request is the
        one that the mesh has."""
        if not asked.has_cursors:
            raise InvalidRequest("last-event-id goes on with a stream of one prompt", field="last-event-id")
        here, other = (CHATS, COMPLETIONS) if self._chat else (COMPLETIONS, CHATS)
        if self._gateway.request_id(cursor).startswith(other.prefix):
            raise InvalidRequest(
                f"last-event-id is of a stream of {other.path}, and cannot go on as one of {here.path}; send it there, or to /v1/resume",
                field="last-event-id",
            )
        call = Call("http", trace=trace_of(headers), spelled=True, moves=Moves.LATE)
        async with self._gateway.resume(cursor, call) as resumption:
            exchange.request_id = resumption.answer.request_id
            reply = (ChatReply if self._chat else CompletionReply)(
                reply_id=exchange.request_id,
                created=resumption.request.accepted_at.seconds,
                model=resumption.request.model,
                include_usage=asked.include_usage,
                logprobs=resumption.request.sampling.HasField("logprobs"),
                offsets=[place.num_characters for place in resumption.start.places],
            )
            answers, start = [resumption.answer], resumption.start
            await Streamed(exchange, asked, answers, reply, keepalive=self._keepalive, start=start).write()

    def _reply(self, exchange: Exchange, asked: Asked) -> Reply:
        return (ChatReply if self._chat else CompletionReply)(
            reply_id=exchange.request_id,
            created=int(time.time()),
            model=self._gateway.models()[0].name,
            include_usage=asked.stream and asked.include_usage,
            logprobs=asked.requests[0].sampling.HasField("logprobs"),
        )


class Streamed:
    """Writes answers as server-sent events. Where there is one answer, each event's id is its cursor."""

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        answers: list[Answer],
        reply: Reply,
        *,
        keepalive: float,
        start: Cursor | None = None,
    ) -> None:
        """`start`: where the one answer goes on, if its beginning was written before."""
        self._exchange = exchange
        self._asked = asked
        self._answers = answers
        self._reply = reply
        self._keepalive = keepalive
        self._start = start
        self._ledger = Ledger()

    async def write(self) -> None:
        """The whole response, errors of the answers too."""
        await self._exchange.begin_stream()
        try:
            await self._begin()
            await all_of(self._follow(index) for index in range(len(self._answers)))
        except HoldfastError as error:
            await self._exchange.refuse(error)
            return
        if self._asked.include_usage:
            await self._event(self._reply.usage_chunk(self._ledger))
        await self._exchange.end_stream()

    async def _begin(self) -> None:
        for index, answer in enumerate(self._answers):
            self._ledger.prompt(answer.prompt_tokens)
            if self._start is not None:
                await self._begin_again(answer, self._start)
                return
            for choice in range(self._asked.num_choices):
                await self._event(self._reply.first_chunk(index * self._asked.num_choices + choice), answer.cursor)

    async def _begin_again(self, answer: Answer, start: Cursor) -> None:
        """Counts what ended before. What opens a choice may have been lost, where nothing came after it."""
        for choice, place in enumerate(start.places):
            if place.end is not None and place.end_taken:
                self._ledger.finished(place.end.usage, first=choice == 0)
            elif place.prefix.count == 0:
                await self._event(self._reply.first_chunk(choice), answer.cursor)

    async def _follow(self, index: int) -> None:
        answer, num_choices = self._answers[index], self._asked.num_choices
        while not answer.at_end:
            events = await answer.next(timeout=self._keepalive)
            if not events:
                await self._exchange.write(": keep-alive\n\n")
            for event in events:
                choice = index * num_choices + event.choice
                if isinstance(event, Finished):
                    self._ledger.finished(event.usage, first=event.choice == 0)
                    await self._event(self._reply.last_chunk(choice, finish_reason(event)), event.cursor)
                else:
                    assert isinstance(event, SpelledTokens)
                    await self._event(self._reply.chunk(choice, event), event.cursor)

    async def _event(self, data: str, cursor: str = "") -> None:
        if not data:
            return
        await self._exchange.event(data, cursor=cursor if len(self._answers) == 1 else "")


class InOnePiece:
    """Collects answers and writes one object."""

    def __init__(self, exchange: Exchange, asked: Asked, answers: list[Answer], reply: Reply) -> None:
        self._exchange = exchange
        self._num_choices = asked.num_choices
        self._answers = answers
        self._reply = reply
        self._ledger = Ledger()
        self._choices = [Whole() for _ in answers for _ in range(asked.num_choices)]

    async def write(self) -> None:
        """The whole response; raises the errors of the answers."""
        await all_of(self._collect(index) for index in range(len(self._answers)))
        await self._exchange.respond(self._reply.whole(self._choices, self._ledger))

    async def _collect(self, index: int) -> None:
        answer = self._answers[index]
        self._ledger.prompt(answer.prompt_tokens)
        while not answer.at_end:
            for event in await answer.next():
                whole = self._choices[index * self._num_choices + event.choice]
                if isinstance(event, Finished):
                    self._ledger.finished(event.usage, first=event.choice == 0)
                    whole.finish_reason = finish_reason(event)
                else:
                    assert isinstance(event, SpelledTokens)
                    whole.text.append(event.text)
                    whole.logprobs += spelled_logprobs(event)
