"""The requests that were given up, as the log keeps them: for people, and for programs that look after them."""

from __future__ import annotations

from holdfast.bus import Bus
from holdfast.topics import DEAD
from holdfast.v1 import generation_pb2 as pb


async def dead_letters(bus: Bus) -> list[pb.DeadLetter]:
    """Those that the log has now, oldest first. Of one request there may be several, where its end came later."""
    partition = DEAD.partition(0)
    kept, letters = await bus.kept(partition), list[pb.DeadLetter]()
    async with bus.reader({partition: kept.start}) as reader:
        while reader.position(partition) < kept.stop:
            letters += [pb.DeadLetter.FromString(record.value) for record in await reader.read()]
    return letters
