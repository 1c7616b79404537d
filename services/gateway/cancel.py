"""Wishes that requests end, on their way to the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from holdfast.bus import Bus
from holdfast.errors import HoldfastError
from holdfast.topics import CONTROL
from holdfast.v1.generation_pb2 import Cancel
from services.gateway.tasks import unwrapped

LAST_WISHES_SECONDS = 5.0
"""How long the last cancellations may take to reach the log when a gateway stops; what is left then is forgotten."""

log = structlog.get_logger(__name__)


class Canceller:
    """Publishes cancellations. `wish` may be called where nothing may wait, such as the end of a call that was
    cancelled itself; what was wished is published in order while `publishing` is entered, the rest before it is left."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._wishes: asyncio.Queue[Cancel | None] = asyncio.Queue()
        """Of each request one for each of its choices, and one for all, at most. None ends it."""

    async def cancel(self, request_id: str, reason: str) -> None:
        """Returns when the log has the wish that whatever has the id now, a client's or the log's, ends.

        Raises:
            Unavailable: the log cannot be reached.
        """
        await self._publish(Cancel(request_id=request_id, reason=reason))

    def wish(self, request_id: str, choice: int | None, reason: str, *, accepted_at: int | None) -> None:
        """Has a request, or one choice of it, end as soon as the log can be told. `accepted_at`: what its record says, in
        nanoseconds since the epoch, so that no other request is meant that has the id by then; None where it says nothing."""
        wish = Cancel(request_id=request_id, choice=choice, reason=reason)
        if accepted_at is not None:
            wish.accepted_at.FromNanoseconds(accepted_at)
        self._wishes.put_nowait(wish)

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        """Publishes wishes while the block runs, and before it is left those that are left, as far as the log takes
        them in LAST_WISHES_SECONDS."""
        with unwrapped():
            async with asyncio.TaskGroup() as group:
                publishing = group.create_task(self._publish_wishes())
                try:
                    yield
                finally:
                    self._wishes.put_nowait(None)
                    await asyncio.wait([publishing], timeout=LAST_WISHES_SECONDS)
                    publishing.cancel()

    async def _publish_wishes(self) -> None:
        while (wish := await self._wishes.get()) is not None:
            await self._try(wish)

    async def _try(self, wish: Cancel) -> None:
        try:
            await self._publish(wish)
        except HoldfastError as error:  # its engine goes on to max_tokens or the deadline, and nobody listens
            log.warning("a cancellation could not be published", request_id=wish.request_id, reason=str(error))

    async def _publish(self, wish: Cancel) -> None:
        await self._bus.publish(CONTROL.partition(0), wish.SerializeToString(), key=wish.request_id.encode())
