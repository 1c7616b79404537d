"""Wishes that requests end, on their way to the log."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from holdfast.bus import Headers, TopicPartition
from holdfast.errors import Unavailable
from holdfast.memory import MemoryBus
from holdfast.topics import CONTROL, TOPICS
from holdfast.v1.generation_pb2 import Cancel
from services.gateway.cancel import Canceller


async def test_all_wishes_are_published_in_order_before_the_end() -> None:
    """Leaving publishes what was wished until then, a choice or a whole request, with the request's id as key."""
    async with MemoryBus() as bus:
        await bus.create_topics(TOPICS)
        canceller = Canceller(bus)
        async with bus.reader({CONTROL.partition(0): 0}) as reader:
            async with canceller.publishing():
                canceller.wish("a", None, "gone", accepted_at=None)
                canceller.wish("b", 3, "found", accepted_at=7)
            records = await reader.read()
        assert [record.key for record in records] == [b"a", b"b"]
        wishes = [Cancel.FromString(record.value) for record in records]
        meant = Timestamp(nanos=7)
        assert wishes == [
            Cancel(request_id="a", reason="gone"),
            Cancel(request_id="b", choice=3, reason="found", accepted_at=meant),
        ]
        assert not wishes[0].HasField("choice")


class Deaf(MemoryBus):
    """A log that takes nothing."""

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        raise Unavailable("the log did not answer")


async def test_a_wish_that_cannot_be_published_ends_nothing_else() -> None:
    """A wish is dropped where the log cannot be reached; who waits for one is told."""
    async with Deaf() as bus:
        canceller = Canceller(bus)
        async with canceller.publishing():
            canceller.wish("a", None, "gone", accepted_at=None)
            canceller.wish("b", None, "gone", accepted_at=None)
        with pytest.raises(Unavailable):
            await canceller.cancel("a", "asked")
