"""gRPC servers and channels with one set of options, one life and one translation of errors.

Options and why: the notes beside them. A stream of ours is always opened with `streaming`, which cancels the call when
the block is left: grpcio 1.83 to 1.85 does not cancel a call that is merely abandoned (grpc/grpc#43462).
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from holdfast.errors import (
    CannotListen,
    ConfigurationError,
    HoldfastError,
    InternalError,
    InvalidRequest,
    from_rpc_error,
    to_status,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MESSAGE_BYTES = 16 << 20

MAX_PORT = (1 << 16) - 1

_IPV4 = re.compile(r"\d+\.\d+\.\d+\.\d+:\d+")

_SIZES = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]

SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    ("grpc.so_reuseport", 0),  # with 1, the default, a second server takes half of the calls without a word
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A long prefill sends nothing for a while; a client's pings must not count as abuse meanwhile.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            # Calls that may be repeated. Generate and Submit are not among them: the mesh resumes, gRPC must not retry.
            "name": [
                {"service": "holdfast.v1.TokenizerService", "method": method}
                for method in ("Encode", "EncodeChat", "GetTokenizerInfo")
            ]
            + [{"service": "holdfast.v1.GatewayService", "method": method} for method in ("Cancel", "ListModels")]
            + [{"service": "holdfast.v1.KVStoreService", "method": "Lookup"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    *_SIZES,
    # A server that is frozen is left after some twenty seconds. What a ping is waited for has a limit of its own, of a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
]


def channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`, or in turns to several of which each host is an IPv4 number, with commas between. The caller
    closes it (`async with`).

    Raises:
        ConfigurationError: there is no such port, or hosts that are names are among several. gRPC would take another port,
            or wait for ever, without a word.
    """
    several = address.split(",")
    for each in several:
        port = each.rpartition(":")[2]
        if port.isdecimal() and int(port) > MAX_PORT:
            raise ConfigurationError(f"{address} is no address: a port is at most {MAX_PORT}")
    if len(several) > 1 and not address.startswith(("ipv4:", "ipv6:")):
        if not all(_IPV4.fullmatch(each) for each in several):
            raise ConfigurationError(
                f"{address} is no address: give several as 10.0.0.1:50052,10.0.0.2:50052, or one name that has them all"
            )
        address = f"ipv4:{address}"
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


@asynccontextmanager
async def streaming(call: T) -> AsyncIterator[T]:
    """The call, cancelled when the block is left however it is left; after its end that changes nothing."""
    try:
        yield call
    finally:
        call.cancel()  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Servicer:
    """One service of a server: how to add it, and its full name for health and reflection."""

    name: str
    """`holdfast.v1.GatewayService`."""
    add: Callable[[grpc.aio.Server], None]


@dataclass(slots=True)
class Server:
    """A running server."""

    address: str
    """`host:port`, the port that was really bound."""
    port: int
    health: Health = field(repr=False)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """grpc.health.v1 of one server: NOT_SERVING until `ready`, and again from `leave` on. A watch ends with that: one
    that went on would hold the drain of the server to its limit. What the server needs has a name and a status too."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {"", *names}
        self._needs: dict[str, bool] = {}
        self._serving = False
        self._left = False
        self._changed = asyncio.Condition()

    async def ready(self) -> None:
        """All is there: model, tokenizer, log."""
        await self._set(serving=not self._left)

    async def not_ready(self) -> None:
        """Something that calls need is missing."""
        await self._set(serving=False)

    async def needs(self, there: Mapping[str, bool]) -> None:
        """What calls need, by name, and whether it is there: whoever asks for the name is told."""
        async with self._changed:
            self._needs = dict(there)
            self._changed.notify_all()

    async def leave(self) -> None:
        """Never ready again."""
        self._left = True
        await self._set(serving=False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names | self._needs.keys():
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            elif self._left:
                return
            else:
                async with self._changed:
                    await self._changed.wait_for(functools.partial(self._has_news, request.service, told))

    async def _set(self, *, serving: bool) -> None:
        async with self._changed:
            self._serving = serving
            self._changed.notify_all()

    def _has_news(self, service: str, told: int) -> bool:
        return self._left or self._status(service) != told

    def _status(self, service: str) -> int:
        status = health_pb2.HealthCheckResponse
        if service not in self._names | self._needs.keys():
            return int(status.SERVICE_UNKNOWN)
        return int(status.SERVING if self._needs.get(service, self._serving) else status.NOT_SERVING)


@asynccontextmanager
async def serving(address: str, servicers: Sequence[Servicer], *, drain: float) -> AsyncIterator[Server]:
    """A server on `host:port` (port 0: any), with health, reflection and channelz beside the servicers. It is healthy
    once the caller says `server.health.ready()`. Leaving the block refuses new calls, lets running ones end for at
    most `drain` seconds and cancels what is left.

    Raises:
        CannotListen: the address cannot be bound.
    """
    from grpc_channelz.v1 import channelz
    from grpc_health.v1.health import SERVICE_NAME as HEALTH
    from grpc_reflection.v1alpha import reflection

    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[_Readable()])
    names = [servicer.name for servicer in servicers]
    health = Health(names)
    for servicer in servicers:
        servicer.add(server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    channelz.add_channelz_servicer(server)
    reflection.enable_server_reflection([*names, HEALTH, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise CannotListen(address) from error
    await health.not_ready()
    await server.start()
    try:
        yield Server(address=f"{address.rpartition(':')[0]}:{port}", port=port, health=health)
    finally:
        await health.leave()
        await server.stop(drain)


class _Readable(grpc.aio.ServerInterceptor):
    """Hands a message that cannot be read (broken UTF-8, say) to the handler as the error that it is: by itself grpcio
    ends the call with UNKNOWN and logs a traceback."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        return handler._replace(request_deserializer=functools.partial(_parsed, handler.request_deserializer))


def _parsed(parse: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return parse(content)
    except DecodeError as error:
        return InvalidRequest(f"the request cannot be read: {error}")


def _readable(request: Any) -> Any:
    """The request, or its stream.

    Raises:
        InvalidRequest: it could not be read; from a stream, when its turn comes.
    """
    if isinstance(request, InvalidRequest):
        raise request
    return _each_readable(request) if hasattr(request, "__aiter__") else request


async def _each_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def unary(method: Callable[..., Any]) -> Any:
    """A unary handler whose errors of ours become the call's status. An error that is not ours is logged and becomes
    INTERNAL, without its text: that may hold what a client must not see."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(self, _readable(request), context)
        except Exception as error:  # noqa: BLE001 - every call gets an answer
            await _abort(context, error)

    return handler


def stream(method: Callable[..., Any]) -> Any:
    """The same for a handler that is an async generator."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with aclosing(method(self, _readable(request), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - every call gets an answer
            await _abort(context, error)

    return handler


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    if not isinstance(error, HoldfastError):
        log.exception("unexpected error in a call", exc_info=error)
        error = InternalError("internal error; the service's log has it")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
