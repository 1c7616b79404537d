"""`holdfast trace`: finds in the log what it tells of one request (`holdfast.timeline`)."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Mapping

from google.protobuf.message import DecodeError

from holdfast import ids
from holdfast.bus import Bus, Record, TopicPartition
from holdfast.errors import InvalidRequest, NotFound, Unavailable
from holdfast.records import readable
from holdfast.timeline import Event, Timeline, cancels, in_order, letters
from holdfast.topics import CONTROL, DEAD, REQUESTS, TOKENS, Topic
from holdfast.v1 import generation_pb2 as pb

READ_SECONDS = 10.0
"""How long the log may take for the next records of those that it has."""

_MAC_BYTES = 16
"""Of a cursor's signature, which nobody needs who may read the log."""

Tell = Callable[[str], object]


async def trace(bus: Bus, request_id: str = "", *, cursor: str = "", tell: Tell = lambda line: None) -> list[Event]:
    """A request's life. By its id, the client's or the log's, all request partitions are read, as far back as the log keeps them; by a cursor one
    record. Of several requests of one id it is that of the newest. `tell` is told in lines what takes long.

    Raises:
        InvalidRequest: that is no cursor, or no id.
        NotFound: the log has no such request, or no longer.
        Unavailable: the log cannot be read.
    """
    record = await _at(bus, cursor) if cursor else await _by_id(bus, request_id, tell)
    timeline = Timeline(record)
    await _read_answer(bus, timeline, tell)
    request = timeline.request
    since_ms = record.timestamp_ms
    beside = [
        *cancels(request, await whole(bus, CONTROL), since_ms=since_ms),
        *letters(request.request_id, await whole(bus, DEAD)),
    ]
    return in_order(timeline.ended(), beside)


async def _at(bus: Bus, cursor: str) -> Record:
    """The request that a cursor is of."""
    try:
        content = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)[:-_MAC_BYTES]
        place = pb.Cursor.FromString(content)
        partition = REQUESTS[place.source.request_class].partition(place.source.partition)
    except (ValueError, KeyError, DecodeError) as error:
        raise InvalidRequest("not a cursor; give one as it came", field="cursor") from error
    kept = await bus.kept(partition)
    if place.request_offset in kept:
        async for record in _read(bus, {partition: range(place.request_offset, place.request_offset + 1)}):
            if record.key == ids.of_client(place.request_id).encode():
                return record
    raise NotFound(f"the log does not hold request {ids.of_client(place.request_id)}, or no longer")


async def _by_id(bus: Bus, request_id: str, tell: Tell) -> Record:
    called = ids.of_client(request_id)
    ids.check(called)
    places = {partition: await bus.kept(partition) for topic in REQUESTS.values() for partition in topic.partitions}
    number = sum(map(len, places.values()))
    tell(f"looking through {number} requests of {len(places)} partitions")
    found = [record async for record in _read(bus, places) if record.key == called.encode()]
    if request_id != called:
        found = [
            record for record, request in readable(found, pb.GenerationRequest) if request.request_id == request_id
        ]
    if not found:
        raise NotFound(f"the log holds no request {request_id}; it keeps requests for a day")
    if len(found) > 1:
        tell(f"{len(found)} requests had that id; this is the newest, and a cursor names any of them")
    return max(found, key=lambda record: record.timestamp_ms)


async def _read_answer(bus: Bus, timeline: Timeline, tell: Tell) -> None:
    """Until the request's end, or as far as the log goes now."""
    request = timeline.request
    partition = TOKENS.partition(request.reply_partition)
    kept = await bus.kept(partition)
    if kept.start > request.reply_start_offset:
        lost = f"the log no longer holds {TOKENS.name}[{partition.partition}] before offset {kept.start}"
        timeline.missing(timeline.events[0].at_ms, f"{lost}, where the answer began; its tokens cannot be judged")
        return
    places = {partition: range(request.reply_start_offset, kept.stop)}
    tell(f"reading up to {len(places[partition])} records of reply partition {partition.partition}")
    async for record in _read(bus, places):
        timeline.feed(record)
        if timeline.has_ended:
            return


async def whole(bus: Bus, topic: Topic) -> list[Record]:
    """All that a topic of one partition holds.

    Raises:
        Unavailable: the log cannot be read.
    """
    partition = topic.partition(0)
    return [record async for record in _read(bus, {partition: await bus.kept(partition)})]


async def _read(bus: Bus, places: Mapping[TopicPartition, range]) -> AsyncIterator[Record]:
    """The records at these offsets."""
    ends = {partition: offsets.stop for partition, offsets in places.items() if offsets}
    if not ends:
        return
    async with bus.reader({partition: places[partition].start for partition in ends}) as reader:
        while any(reader.position(partition) < end for partition, end in ends.items()):
            records = await reader.read(timeout=READ_SECONDS)
            if not records:
                raise Unavailable(f"the log gave nothing more for {READ_SECONDS:g} seconds")
            for record in records:
                if record.offset < ends[record.topic_partition]:
                    yield record
