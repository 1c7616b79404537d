"""What an engine does before it answers a request that another one may have begun.

Whoever owned a source partition before may still write for it: it froze, or a record of it is on its way. So before an
engine says anything for a source partition in a reply partition, it puts its **marker** there, a record without streams:
from that on readers ignore every lower epoch (`holdfast.accept`). What stands between the request's start and the marker
is all that any reader ever accepts of the old owners. The engine reads it by the same rule, and goes on from there.

    reply partition   ... S ....... tokens of old owners ....... M  late tokens of old owners: ignored
                          |<---------- read, by rule R -------->|   the new owner goes on

A request that was published behind the marker (S > M) nobody else can have begun: nothing is read for it. Requests of one
reply partition that wait at the same time are read for once.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import structlog
from google.protobuf.message import DecodeError

from holdfast import topics
from holdfast.accept import End, Epochs, Prefix, Source, Verdict, judge
from holdfast.bus import Bus, Record, TopicPartition
from holdfast.errors import Unavailable
from holdfast.v1 import generation_pb2 as pb

RETRY_SECONDS = 0.5
"""The pause before what the log refused is tried again: time for it to come back."""

_BY_TOKENS = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
_CLASSES = {topic.name: request_class for request_class, topic in topics.REQUESTS.items()}

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Standing:
    """One choice of a request, as its readers know it."""

    token_ids: list[int] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)
    has_ended: bool = False
    is_broken: bool = False
    """Its tokens have a hole or contradict each other: its readers have ended it with an error, or will."""


def nothing_told(num_choices: int) -> list[Standing]:
    """Of a request that nobody has begun."""
    return [Standing() for _ in range(num_choices)]


@dataclass(slots=True, eq=False)
class _Wanted:
    """A request that waits for what the log has of it."""

    source: TopicPartition
    request_id: str
    start: int
    num_choices: int
    then: Callable[[list[Standing]], None]
    is_lost: bool = False


@dataclass(slots=True)
class _Lane:
    """What waits for one reply partition."""

    partition: TopicPartition
    waiting: list[_Wanted] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Takeover:
    """Markers, and what was said before them. Lives in the event loop."""

    def __init__(
        self,
        bus: Bus,
        *,
        engine: str,
        epoch_of: Callable[[TopicPartition], int | None],
        outbid: Callable[[TopicPartition], None],
    ) -> None:
        """`epoch_of` gives the epoch in which this engine owns a source partition, None where it does not. `outbid` is told
        of one for which a later owner has written already."""
        self._bus = bus
        self._engine = engine
        self._epoch_of = epoch_of
        self._outbid = outbid
        self._lanes = [_Lane(partition) for partition in topics.TOKENS.partitions]
        self._markers: dict[TopicPartition, dict[int, int]] = defaultdict(dict)
        """Of each source partition that is owned: the offset of its marker in each reply partition that has one."""

    def is_fresh(self, source: TopicPartition, request: pb.GenerationRequest) -> bool:
        """Whether nobody but this engine can have begun the request."""
        marker = self._markers[source].get(request.reply_partition)
        return marker is not None and request.reply_start_offset > marker

    def ask(
        self,
        source: TopicPartition,
        request: pb.GenerationRequest,
        num_choices: int,
        then: Callable[[list[Standing]], None],
    ) -> None:
        """Calls `then`, once this engine may answer the request, with what the log has of each choice. Never where the
        partition is lost before."""
        lane = self._lanes[request.reply_partition]
        lane.waiting.append(_Wanted(source, request.request_id, request.reply_start_offset, num_choices, then))
        lane.wake.set()

    def lose(self, partitions: Collection[TopicPartition]) -> None:
        """They are another engine's now: to answer for them again takes new markers."""
        for partition in partitions:
            self._markers.pop(partition, None)
        for wanted in (each for lane in self._lanes for each in lane.waiting if each.source in partitions):
            wanted.is_lost = True

    async def run(self) -> None:
        """Serves until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for lane in self._lanes:
                tasks.create_task(self._serve(lane))

    async def _serve(self, lane: _Lane) -> None:
        while True:
            await lane.wake.wait()
            lane.wake.clear()
            try:
                await self._mark(lane)
                await self._read(lane)
            except Unavailable as error:
                log.warning("taking over waits for the log", reply_partition=lane.partition.partition, error=str(error))
                lane.wake.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def _mark(self, lane: _Lane) -> None:
        """Puts the markers that are missing."""
        reply = lane.partition.partition
        missing: list[dict[int, int]] = []
        acks: list[asyncio.Future[int]] = []
        for source in {each.source for each in lane.waiting}:
            epoch, markers = self._epoch_of(source), self._markers[source]
            if epoch is not None and reply not in markers:
                acks.append(await self._bus.send(lane.partition, self._marker(source, epoch)))
                missing.append(markers)
        for markers, offset in zip(missing, await asyncio.gather(*acks), strict=True):
            markers[reply] = offset  # where the partition was lost meanwhile, these are no longer the ones that count

    async def _read(self, lane: _Lane) -> None:
        """Finds out what is known of the requests whose source partition has its marker here, and lets them go on."""
        reply = lane.partition.partition
        ready = [each for each in lane.waiting if each.is_lost or reply in self._markers[each.source]]
        markers = {each.source: self._markers[each.source][reply] for each in ready if not each.is_lost}
        begun = [each for each in ready if not each.is_lost and each.start <= markers[each.source]]
        scan = _Scan(begun, markers)
        if begun:
            await self._feed(scan, lane.partition)
        lane.waiting = [each for each in lane.waiting if each not in ready]
        if lane.waiting:
            lane.wake.set()
        for source in {each.source for each in begun if not each.is_lost}:
            if scan.highest(source) > (self._epoch_of(source) or 0):
                log.warning("another engine owns the partition", source=source, epoch=scan.highest(source))
                self._outbid(source)
        for each in ready:
            if not each.is_lost:
                each.then(scan.standings.get(each) or nothing_told(each.num_choices))

    async def _feed(self, scan: _Scan, partition: TopicPartition) -> None:
        kept = await self._bus.kept(partition)
        async with self._bus.reader({partition: max(scan.start, kept.start)}) as reader:
            while reader.position(partition) <= scan.end:
                for record in await reader.read():
                    scan.take(record)

    def _marker(self, source: TopicPartition, epoch: int) -> bytes:
        owned = pb.SourcePartition(request_class=_CLASSES[source.topic], partition=source.partition)
        return pb.TokenBatch(source=owned, epoch=epoch, engine=self._engine).SerializeToString()


class _Scan:
    """What records up to the markers say of some requests. Pure: fed with records in the order of the log."""

    def __init__(self, wanted: Collection[_Wanted], markers: dict[TopicPartition, int]) -> None:
        """`markers`: the offset of each source partition's. What comes behind one is of no lower epoch than ours, and ours has
        told nothing of these requests yet."""
        self.start = min((each.start for each in wanted), default=0)
        self.end = max((markers[each.source] for each in wanted), default=-1)
        self.standings = {each: nothing_told(each.num_choices) for each in wanted}
        self._epochs = Epochs()
        self._wanted = {(_source(each.source), each.request_id): each for each in wanted}

    def highest(self, source: TopicPartition) -> int:
        """The highest epoch met from a source partition."""
        return self._epochs.highest(_source(source))

    def take(self, record: Record) -> None:
        """One more record. What is no record of tokens is passed over, as readers do."""
        try:
            batch = pb.TokenBatch.FromString(record.value)
        except DecodeError:
            return
        source = Source(batch.source.request_class, batch.source.partition)
        if not self._epochs.admit(source, batch.epoch):
            return
        for stream in batch.streams:
            wanted = self._wanted.get((source, stream.request_id))
            # An id may have been used before.
            if wanted is not None and record.offset >= wanted.start and stream.choice < wanted.num_choices:
                _judge(self.standings[wanted][stream.choice], stream)


def _source(partition: TopicPartition) -> Source:
    return Source(_CLASSES[partition.topic], partition.partition)


def _judge(standing: Standing, stream: pb.StreamTokens) -> None:
    if standing.has_ended or standing.is_broken:
        return
    end = End.OPEN
    if stream.HasField("finish"):
        end = End.BY_TOKENS if stream.finish.reason in _BY_TOKENS else End.OUTRIGHT
    ruling = judge(
        standing.prefix,
        first_index=stream.first_index,
        token_ids=stream.token_ids,
        prefix_hash=stream.prefix_hash,
        end=end,
    )
    standing.token_ids += stream.token_ids[ruling.num_known :]
    standing.prefix, standing.has_ended = ruling.prefix, ruling.ends
    standing.is_broken = ruling.verdict in (Verdict.GAP, Verdict.CONFLICT) and not ruling.ends
