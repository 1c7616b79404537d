"""The ends of reply partitions, as far as somebody reads them here: the gateway's own always, another while a stream of it is
open here. However many these are, a partition is read once, and each record of it parsed once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from holdfast.bus import Bus
from services.gateway.answer import Answer
from services.gateway.catch_up import catch_up
from services.gateway.streams import Streams


@dataclass(slots=True)
class _Tail:
    """One that somebody reads."""

    streams: Streams
    reading: asyncio.Task[None]
    num_readers: int = 0


class Tails:
    """Reads partitions while `run` runs."""

    def __init__(self, bus: Bus, make: Callable[[int], Streams]) -> None:
        """`make`: the streams of a partition."""
        self._bus = bus
        self._make = make
        self._tails: dict[int, _Tail] = {}
        self._group = asyncio.TaskGroup()

    async def run(self) -> None:
        """Until cancelled."""
        async with self._group:
            await asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def of(self, reply_partition: int) -> AsyncIterator[Streams]:
        """The streams of a partition, read while the block runs."""
        tail = self._tails.get(reply_partition) or self._begin(reply_partition)
        tail.num_readers += 1
        try:
            yield tail.streams
        finally:
            tail.num_readers -= 1
            if tail.num_readers == 0:
                del self._tails[reply_partition]
                tail.reading.cancel()

    def fell_behind(self, answer: Answer, tail: Streams) -> None:
        """Too much waits for the client: from now on it gets what it takes, from the log, until it has caught up."""
        tail.forget(answer)
        self._group.create_task(catch_up(self._bus, answer, answer.mark, tail))

    def _begin(self, reply_partition: int) -> _Tail:
        streams = self._make(reply_partition)
        tail = _Tail(streams, self._group.create_task(streams.run()))
        self._tails[reply_partition] = tail
        return tail
