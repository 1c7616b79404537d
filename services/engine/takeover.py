"""What an engine does before it answers a request: it makes sure that nobody else does, and finds out how far others came.

`holdfast.ownership` says what is to be done, and why; here it is done. Of each reply partition one task puts the markers
that are wanted there, all at once, and reads it for all that wait, once. Requests wait for nothing but that, and hold up no others.

A reply partition gets its marker when the first request is answered there: to put one into all 32 of them for each of 64 source
partitions would be two thousand records at a rebalance, most of them where nobody listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import structlog

from holdfast import topics
from holdfast.accept import Source
from holdfast.bus import Bus, TopicPartition
from holdfast.epochs import describe_epoch
from holdfast.errors import Unavailable
from holdfast.ownership import Accepted, Scan, Standing, Tenure
from holdfast.records import Batch, batch_from_wire, readable, source_from_wire, source_of, source_to_wire
from holdfast.v1 import generation_pb2 as pb
from services.engine.emit import RETRY_SECONDS

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Lane:
    """What is to be done in one reply partition."""

    partition: TopicPartition
    markers: list[Tenure] = field(default_factory=list)
    scans: list[tuple[Tenure, Scan]] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Takeover:
    """The tenures of this engine. Lives in the event loop."""

    def __init__(self, bus: Bus, *, engine: str, outbid: Callable[[TopicPartition], None]) -> None:
        """`outbid` is told of a source partition that turns out to be another engine's."""
        self._bus = bus
        self._engine = engine
        self._outbid = outbid
        self._lanes = [_Lane(partition) for partition in topics.TOKENS.partitions]
        self._tenures: dict[TopicPartition, Tenure] = {}
        self._waiting: dict[tuple[Tenure, str], Callable[[Standing], None]] = {}

    def gain(self, partition: TopicPartition, epoch: int) -> None:
        """The source partition is ours from now on."""
        source = source_of(partition)
        self._tenures[partition] = Tenure(source, epoch, range(len(self._lanes)))

    def lose(self, partitions: Collection[TopicPartition]) -> None:
        """They are another engine's now. Whoever waits for what is known of their requests is never told."""
        lost = {self._tenures.pop(partition) for partition in partitions if partition in self._tenures}
        for tenure in lost:
            tenure.end()
        self._waiting = {key: then for key, then in self._waiting.items() if key[0] not in lost}

    def epoch_of(self, partition: TopicPartition) -> int | None:
        """The epoch in which this engine owns a source partition, None where it does not."""
        tenure = self._tenures.get(partition)
        return None if tenure is None else tenure.epoch

    def ask(self, partition: TopicPartition, request: Accepted, then: Callable[[Standing], None]) -> str:
        """Calls `then`, once this engine may answer the request, with what the log has of it; at once where nobody else can
        have begun it. Returns under which name it is claimed: one that is given an id while another has it has told
        nothing yet, and is claimed under a name of its own."""
        tenure = self._tenures[partition]
        while not tenure.meet(request):
            request = replace(request, request_id=f"{request.request_id}, again")
        self._waiting[tenure, request.request_id] = then
        self._turn(partition, tenure)
        return request.request_id

    def forget(self, partition: TopicPartition, request_id: str) -> None:
        """A request is done."""
        if (tenure := self._tenures.get(partition)) is not None:
            tenure.forget(request_id)

    async def run(self) -> None:
        """Serves until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for lane in self._lanes:
                tasks.create_task(self._serve(lane))

    def _turn(self, partition: TopicPartition, tenure: Tenure) -> None:
        """Has done what a tenure wants, and tells what it found out."""
        for number in tenure.take_markers():
            self._lanes[number].markers.append(tenure)
            self._lanes[number].wake.set()
        for scan in tenure.take_scans():
            lane = self._lanes[scan.reply_partition]
            lane.scans.append((tenure, scan))
            lane.wake.set()
        for claim in tenure.take_claims():
            self._waiting.pop((tenure, claim.request.request_id))(claim.standing)
        if tenure.is_over and self._tenures.get(partition) is tenure:
            epochs = {"own": describe_epoch(tenure.epoch), "met": describe_epoch(tenure.outbid_by)}
            log.warning("another engine owns the partition", source=partition, **epochs)
            self._outbid(partition)

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
        wanted = [tenure for tenure in lane.markers if not tenure.is_over]
        acks = [await self._bus.send(lane.partition, self._to_wire(tenure.marker)) for tenure in wanted]
        offsets = await asyncio.gather(*acks)
        lane.markers = [tenure for tenure in lane.markers if tenure not in wanted and not tenure.is_over]
        for tenure, offset in zip(wanted, offsets, strict=True):
            tenure.marked(lane.partition.partition, offset)
            self._turn(_partition(tenure.source), tenure)

    async def _read(self, lane: _Lane) -> None:
        """All that is to be read now, in one go."""
        wanted = [(tenure, scan) for tenure, scan in lane.scans if not tenure.is_over]
        if wanted:
            await self._feed(lane.partition, [scan for _, scan in wanted])
        lane.scans = [each for each in lane.scans if each not in wanted and not each[0].is_over]
        for tenure, scan in wanted:
            tenure.scanned(scan)
            self._turn(_partition(tenure.source), tenure)

    async def _feed(self, partition: TopicPartition, scans: Collection[Scan]) -> None:
        kept = await self._bus.kept(partition)
        for scan in scans:
            scan.kept_from = kept.start
        sources = {scan.source for scan in scans}
        start = max(min(scan.start for scan in scans), kept.start)
        async with self._bus.reader({partition: start}) as reader:
            while not all(scan.is_done for scan in scans):
                for record, message in readable(await reader.read(), pb.TokenBatch):
                    # Most are of sources that nobody asks about: to look into them would take most of the time.
                    batch = batch_from_wire(message) if source_from_wire(message.source) in sources else None
                    for scan in scans:
                        if record.offset >= scan.start:
                            scan.feed(record.offset, batch)

    def _to_wire(self, marker: Batch) -> bytes:
        owned = source_to_wire(marker.source)
        return pb.TokenBatch(source=owned, epoch=marker.epoch, engine=self._engine).SerializeToString()


def _partition(source: Source) -> TopicPartition:
    return topics.REQUESTS[source.request_class].partition(source.partition)  # type: ignore[index]
