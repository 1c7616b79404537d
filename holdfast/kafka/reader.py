"""What reads partitions from a position on.

A cancelled `getmany` of aiokafka leaves a future behind until the next record; so timeouts are given to it, not put around it.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

import aiokafka
from aiokafka import errors

from holdfast.bus import Record, TopicPartition
from holdfast.errors import Unavailable
from holdfast.kafka.names import Names

GETMANY_MS: Final = 3_600_000
"""The longest single wait for records; a read without a timeout waits again."""


class KafkaReader:
    """A `Reader` of a `KafkaBus`."""

    def __init__(self, consumer: aiokafka.AIOKafkaConsumer, names: Names, positions: dict[TopicPartition, int]) -> None:
        self._consumer = consumer
        self._names = names
        self._positions = positions

    async def read(self, *, max_records: int = 1024, timeout: float | None = None) -> list[Record]:
        deadline = deadline_in(timeout)
        while True:
            try:
                batches = await self._consumer.getmany(timeout_ms=left_ms(deadline), max_records=max_records)
            except errors.OffsetOutOfRangeError as error:
                raise Unavailable(f"the log no longer holds, or never held, {error}") from error
            except errors.KafkaError as error:
                raise Unavailable(f"the log cannot be read: {error!r}") from error
            records = self._names.records(batches)
            for record in records:
                self._positions[record.topic_partition] = record.offset + 1
            if records or left_ms(deadline) == 0:
                return records

    def position(self, partition: TopicPartition) -> int:
        return self._positions[partition]


def deadline_in(timeout: float | None) -> float | None:
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


def left_ms(deadline: float | None) -> int:
    """Milliseconds to the deadline, rounded up, for one call of `getmany`."""
    if deadline is None:
        return GETMANY_MS
    return min(GETMANY_MS, max(0, math.ceil((deadline - asyncio.get_running_loop().time()) * 1000)))
