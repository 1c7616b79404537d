"""The requests that were given up, as the log keeps them: for people, and for programs that look after them."""

from __future__ import annotations

from holdfast.bus import Bus
from holdfast.records import readable
from holdfast.topics import DEAD
from holdfast.trace import whole
from holdfast.v1 import generation_pb2 as pb


async def dead_letters(bus: Bus) -> list[pb.DeadLetter]:
    """Those that the log has now, oldest first; what is none is passed over. Of one request there may be several, where its
    end came later.

    Raises:
        Unavailable: the log cannot be read.
    """
    return [letter for _, letter in readable(await whole(bus, DEAD), pb.DeadLetter)]
