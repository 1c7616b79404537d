"""The bodies of HTTP calls as they come in: bounded in size, in sum and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Receive

from holdfast.errors import Overloaded, RequestTooLarge, RequestTooSlow

MAX_BODY_BYTES = 4 << 20
"""Python parses JSON in one go, in a thread too, and meanwhile no stream goes on: for some 50 ms where so many bytes are
token ids, 5 ms where they are text. It is also more than the log takes of one request."""


class ClientLeft(Exception):
    """Nobody waits for the response."""


class Bodies:
    """Reads bodies, as many at once as fit into `max_bytes` together, each within `seconds`."""

    def __init__(self, *, max_bytes: int, seconds: float) -> None:
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._num_bytes = 0
        """Of bodies that have not come to their end."""

    async def read(self, receive: Receive, headers: Mapping[str, str]) -> bytes:
        """A call's body.

        Raises:
            RequestTooLarge: it has more than MAX_BODY_BYTES.
            RequestTooSlow: its end did not come in time.
            Overloaded: there is no room for it beside the others.
            ClientLeft: the client did not wait for its end.
        """
        announced = headers.get("content-length", "0")
        _check_size(int(announced) if announced.isascii() and announced.isdecimal() else 0)
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while await self._read_part(receive, body):
                    _check_size(len(body))
        except TimeoutError as error:
            raise RequestTooSlow(f"the body did not come to its end within {self._seconds:g} seconds") from error
        finally:
            self._num_bytes -= len(body)
        _check_size(len(body))
        return bytes(body)

    async def _read_part(self, receive: Receive, body: bytearray) -> bool:
        """Adds what comes next; returns whether more will."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        if self._num_bytes + len(part) > self._max_bytes:
            raise Overloaded(f"bodies of {self._num_bytes:,} bytes are being read, as many as there is room for")
        body += part
        self._num_bytes += len(part)
        return bool(message.get("more_body", False))


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BODY_BYTES:
        raise RequestTooLarge(f"the body has more than {MAX_BODY_BYTES:,} bytes, the most that is taken")
