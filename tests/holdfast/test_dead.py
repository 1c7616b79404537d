"""Reading the requests that were given up."""

from __future__ import annotations

import pytest

from holdfast import trace
from holdfast.bus import TopicPartition
from holdfast.dead import dead_letters
from holdfast.errors import Unavailable
from holdfast.memory import MemoryBus
from holdfast.topics import DEAD, TOPICS
from holdfast.v1 import generation_pb2 as pb


async def test_what_is_no_letter_is_passed_over() -> None:
    """The others are there, oldest first."""
    async with MemoryBus() as bus:
        await bus.create_topics(TOPICS)
        for value in (pb.DeadLetter(request_id="a").SerializeToString(), b"\xff"):
            await bus.publish(DEAD.partition(0), value)
        await bus.publish(DEAD.partition(0), pb.DeadLetter(request_id="b").SerializeToString())
        assert [letter.request_id for letter in await dead_letters(bus)] == ["a", "b"]


async def test_a_log_that_falls_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a broker is lost while it is read."""

    class Silent(MemoryBus):
        async def kept(self, partition: TopicPartition) -> range:
            return range((await super().kept(partition)).stop + 1)

    monkeypatch.setattr(trace, "READ_SECONDS", 0.01)
    async with Silent() as bus:
        await bus.create_topics(TOPICS)
        with pytest.raises(Unavailable, match="gave nothing more"):
            await dead_letters(bus)
