"""`GET /v1/resume`: any stream of the mesh from a cursor on, as server-sent events in the contract's own words.

Made for a browser's `EventSource`, which comes back by itself with the last `id:` it has: where nothing is left to come
it is told so by 204, and stays away.
"""

from __future__ import annotations

from urllib.parse import parse_qs

from google.protobuf.json_format import MessageToJson
from starlette.types import Receive, Scope, Send

from holdfast.errors import InvalidRequest
from holdfast.events import Finished, Resumed, Tokens
from services.gateway.exchange import Exchange, answering, connected, headers_of, read_clients_id, trace_of
from services.gateway.generate import Call, Gateway
from services.gateway.handover import Moves
from services.gateway.resume import Resumption
from services.gateway.servicer import resumed_response
from services.gateway.settings import GatewaySettings


class Resume:
    """The route: an ASGI application."""

    def __init__(self, gateway: Gateway, settings: GatewaySettings) -> None:
        self._gateway = gateway
        self._keepalive = settings.keepalive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, exchange = headers_of(scope), Exchange(scope, send, "", native=True)
        async with answering(exchange):
            exchange.clients_id = read_clients_id(headers)
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("cursor", [""])[0]
            cursor = headers.get("last-event-id") or asked  # a browser that comes back has the newer one there
            if not cursor:
                raise InvalidRequest("name a cursor: in the header last-event-id, or as ?cursor=", field="cursor")
            call = Call("http", trace=trace_of(headers), moves=Moves.LATE)
            async with connected(receive), self._gateway.resume(cursor, call) as resumption:
                exchange.request_id = resumption.answer.request_id
                if resumption.answer.at_end:
                    await exchange.respond_nothing()
                else:
                    await self._stream(exchange, resumption)

    async def _stream(self, exchange: Exchange, resumption: Resumption) -> None:
        await exchange.begin_stream()
        await _write(exchange, resumption.resumed)
        while not resumption.answer.at_end:
            events = await resumption.answer.next(timeout=self._keepalive)
            if not events:
                await exchange.write(": keep-alive\n\n")
            for event in events:
                await _write(exchange, event)
        await exchange.end_stream()


async def _write(exchange: Exchange, event: Resumed | Tokens | Finished) -> None:
    response = resumed_response(event)
    name = response.WhichOneof("event")
    assert name is not None
    data = MessageToJson(
        getattr(response, name),
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
    )
    await exchange.event(data, cursor=event.cursor, name=name)
