"""Requests that are given up: each is kept as a dead letter before its stream is told.

The letter is written again and again until the log has it, and only then the stream ends, and after that the request is
committed. Whoever owns it next, should this engine end in between, finds it as it was, and gives it up too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from holdfast import ids, topics
from holdfast.bus import Bus
from holdfast.epochs import describe_epoch
from holdfast.errors import HoldfastError, RequestTooLarge, StreamFailed, Unavailable
from holdfast.ownership import Standing
from holdfast.records import source_of, source_to_wire
from holdfast.v1 import generation_pb2 as pb
from services.engine.emit import RETRY_SECONDS
from services.engine.metrics import EngineMetrics
from services.engine.requests import Request

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _GivenUp:
    """A request whose letter is not in the log yet."""

    request: Request
    message: pb.GenerationRequest
    epochs: list[int]

    @property
    def reason(self) -> str:
        tried = ", ".join(describe_epoch(each) for each in self.epochs)
        return (
            f"given up: {len(self.epochs)} engines began this request one after the other (epochs {tried}) and none got "
            f"on with it; it may be what ended them. {topics.DEAD.name} keeps it"
        )


class DeadLetters:
    """Writes them. Lives in the event loop."""

    def __init__(
        self,
        bus: Bus,
        *,
        engine: str,
        end: Callable[[Request, HoldfastError], None],
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`end` is told why a request's stream is to end, once the log has its letter."""
        self._bus = bus
        self._engine = engine
        self._end = end
        self._metrics = metrics
        self._clock = clock
        self._given_up: asyncio.Queue[_GivenUp] = asyncio.Queue()

    def put(self, request: Request, message: pb.GenerationRequest, standing: Standing) -> None:
        """Gives a request up. `message` is its record."""
        self._given_up.put_nowait(_GivenUp(request, message, sorted(standing.vain)))

    async def run(self) -> None:
        """Serves until it is cancelled."""
        while True:
            each = await self._given_up.get()
            if await self._write(each):
                self._metrics.dead_letters.inc()
                log.error("request given up", request_id=each.request.request_id, reason=each.reason)
                self._end(each.request, StreamFailed(each.reason))

    async def _write(self, given_up: _GivenUp) -> bool:
        """Returns once the log has the letter; False where the request is another engine's meanwhile."""
        letter = self._letter(given_up)
        while given_up.request.open:
            try:
                await self._publish(letter)
            except Unavailable as error:
                log.warning("a dead letter waits for the log", request_id=letter.request_id, error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return bool(given_up.request.open)
        return False

    async def _publish(self, letter: pb.DeadLetter) -> None:
        partition, key = topics.DEAD.partition(0), ids.of_client(letter.request_id).encode()
        try:
            await self._bus.publish(partition, letter.SerializeToString(), key=key)
        except RequestTooLarge:
            letter.ClearField("request")
            await self._bus.publish(partition, letter.SerializeToString(), key=key)

    def _letter(self, given_up: _GivenUp) -> pb.DeadLetter:
        request = given_up.request
        letter = pb.DeadLetter(
            request=given_up.message,
            request_id=request.request_id,
            reason=given_up.reason,
            epochs=given_up.epochs,
            num_tokens=[prefix.count for prefix in request.prefixes],
            engine=self._engine,
            source=source_to_wire(source_of(request.source)),
            request_offset=request.offset,
        )
        letter.given_up_at.FromNanoseconds(int(self._clock() * 1e9))
        return letter
