"""Streams that go on from a cursor: what was written meanwhile is read from the log, then what comes as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.message import DecodeError

from holdfast import ids
from holdfast.bus import Bus, Record, TopicPartition
from holdfast.errors import NotFound, Unavailable
from holdfast.events import Resumed
from holdfast.topics import REQUESTS, TOKENS
from holdfast.v1 import generation_pb2 as pb
from services.gateway.answer import Answer
from services.gateway.catch_up import catch_up
from services.gateway.cursor import Cursor, Cursors
from services.gateway.opening import Opening
from services.gateway.settings import GatewaySettings
from services.gateway.tails import Tails
from services.gateway.tasks import running
from services.gateway.tokenizer import Tokenizer

LATE_SECONDS = 5.0
"""What a stream whose deadline has passed is given at least, to show what the log holds of it."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """An answer that goes on."""

    answer: Answer
    start: Cursor
    """Where it does."""
    request: pb.GenerationRequest
    """As the log holds it."""

    @property
    def resumed(self) -> Resumed:
        """What the client is told first."""
        return Resumed(
            self.answer.request_id,
            cursor=self.answer.cursor,
            prompt_tokens=self.answer.prompt_tokens,
            next_index=tuple(place.prefix.count for place in self.start.places),
            ended=tuple(index for index, place in enumerate(self.start.places) if place.end_taken),
        )


class Resumer:
    """Opens answers at cursors."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        bus: Bus,
        tokenizer: Tokenizer,
        tails: Tails,
        opening: Opening,
        cursors: Cursors,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._tokenizer = tokenizer
        self._tails = tails
        self._opening = opening
        self._cursors = cursors

    @asynccontextmanager
    async def resume(self, text: str, *, spelled: bool, only_ask: bool = False) -> AsyncIterator[Resumption]:
        """The answer, from the cursor on, fed while the block runs; leaving it closes the answer, which with `only_ask`
        never cancels the request.

        Raises:
            InvalidRequest: that is no cursor of this mesh.
            NotFound: the log does not hold the stream any more.
            Unavailable: the log cannot be read.
        """
        start = self._cursors.decode(text)
        request = await self._request(start)
        await self._check_kept(TOKENS.partition(start.reply_partition), start.mark.offset, TOKENS.retention)
        async with self._tails.of(start.reply_partition) as tail:
            answer = self._opening.answer(start, request, tail, spelled=spelled, only_ask=only_ask)
            try:
                async with running(catch_up(self._bus, answer, start.mark, tail)):
                    with answer.expiring(_time_left(request)):
                        yield Resumption(answer, start, request)
            finally:
                answer.close()

    async def _request(self, cursor: Cursor) -> pb.GenerationRequest:
        """The request's record."""
        topic = REQUESTS[pb.RequestClass.ValueType(cursor.source.request_class)]
        partition = topic.partition(cursor.source.partition)
        await self._check_kept(partition, cursor.request_offset, topic.retention, num_records=1)
        record = await self._record(partition, cursor.request_offset)
        try:
            request = pb.GenerationRequest.FromString(record.value)
        except DecodeError as error:
            raise NotFound(
                f"the log holds something else where request {ids.of_client(cursor.request_id)} was"
            ) from error
        if request.request_id != cursor.request_id:
            was = ids.of_client(cursor.request_id)
            raise NotFound(f"the log holds another request where {was} was: it was made anew since then")
        if request.model != self._tokenizer.model.name:
            raise NotFound(
                f"the stream is of {request.model!r}, and this gateway serves {self._tokenizer.model.name!r}"
            )
        return request

    async def _record(self, partition: TopicPartition, offset: int) -> Record:
        seconds = self._settings.log_seconds
        async with self._bus.reader({partition: offset}) as reader:
            records = await reader.read(max_records=1, timeout=seconds)
        if not records:
            raise Unavailable(f"the log did not give the request's record within {seconds:g} seconds")
        return records[0]

    async def _check_kept(
        self, partition: TopicPartition, offset: int, retention: timedelta, *, num_records: int = 0
    ) -> None:
        """Raises NotFound where the log does not hold a partition from this offset on, or not so many records there."""
        try:
            async with asyncio.timeout(self._settings.log_seconds):
                kept = await self._bus.kept(partition)
        except TimeoutError as error:
            raise Unavailable(f"the log did not answer within {self._settings.log_seconds:g} seconds") from error
        if offset < kept.start:
            hours = retention / timedelta(hours=1)
            raise NotFound(
                f"the log no longer holds the stream from where the cursor stands; it keeps {partition.topic} for "
                f"{hours:g} hours"
            )
        if offset + num_records > kept.stop:
            raise NotFound("the log does not reach to where the cursor stands: it was made anew since then")


def _time_left(request: pb.GenerationRequest) -> float | None:
    """Seconds until the request's deadline; None for never."""
    if not request.HasField("deadline"):
        return None
    return max(LATE_SECONDS, request.deadline.ToNanoseconds() / 1e9 - time.time())
