"""The requests that were given up, as the log keeps them: for people, and for programs that look after them."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from holdfast.bus import Bus, Record
from holdfast.topics import DEAD
from holdfast.trace import whole
from holdfast.v1 import generation_pb2 as pb


async def dead_letters(bus: Bus) -> list[pb.DeadLetter]:
    """Those that the log has now, oldest first; what is none is passed over. Of one request there may be several, where its
    end came later.

    Raises:
        Unavailable: the log cannot be read.
    """
    return [letter for record in await whole(bus, DEAD) for letter in _letter(record)]


def _letter(record: Record) -> Iterator[pb.DeadLetter]:
    try:
        yield pb.DeadLetter.FromString(record.value)
    except DecodeError:
        return
