"""The log in this process's memory: the bus of the embedded mesh, and of tests.

It keeps the promises of `holdfast.bus` as a broker does, inconveniences included: records are bytes, rebalances are
eager and send every partition's position back to what was committed, a member that was thrown out believes in its
partitions until its next `read`. Unlike a broker it forgets everything when the process ends, and it bounds a topic by
bytes and not by time: beyond `max_topic_bytes` the topic's oldest records are dropped, read or not. A reader that still
wanted one gets `Unavailable`; a group that did reads on from the oldest record kept, as it would on Kafka.

Everything happens in one event loop, and nothing but `read` ever waits: there is no buffer between a sender and the log.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from holdfast.bus import (
    MAX_RECORD_BYTES,
    NOTHING_OWNED,
    Headers,
    Lag,
    Member,
    Ownership,
    Position,
    Reader,
    Record,
    TopicPartition,
    check_commit,
    check_record,
)
from holdfast.errors import ConfigurationError, NotOwner, Unavailable
from holdfast.topics import Topic

RECORD_OVERHEAD_BYTES = 400
"""What a record costs in memory beside the bytes it holds, about: the objects around them."""


class MemoryBus:
    """A `Bus` without a broker. Use it as an async context manager; whatever reads when it closes gets `Unavailable`."""

    def __init__(self, *, max_topic_bytes: int = 256 << 20) -> None:
        if max_topic_bytes < MAX_RECORD_BYTES:
            raise ConfigurationError(f"a topic needs room for one record: {MAX_RECORD_BYTES:,} bytes or more")
        self._max_topic_bytes = max_topic_bytes
        self._logs: dict[str, _TopicLog] = {}
        self._groups: dict[str, _Group] = {}
        self._cursors: set[_Cursor] = set()
        self._open = False

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        for cursor in self._cursors:
            cursor.wake.set()

    async def create_topics(self, topics: Sequence[Topic]) -> None:
        self.check_open()
        for topic in topics:
            log = self._logs.setdefault(topic.name, _TopicLog(topic, self._max_topic_bytes))
            if len(log.partitions) != topic.num_partitions:
                raise ConfigurationError(
                    f"topic {topic.name} exists with {len(log.partitions)} partitions, not {topic.num_partitions}"
                )

    async def send(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int]:
        self.check_open()
        size = check_record(value, key=key, headers=headers)
        offset = self._log(partition).append(partition, value, key=key, headers=headers, size=size)
        acked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        acked.set_result(offset)
        return acked

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        return await (await self.send(partition, value, key=key, headers=headers))

    @asynccontextmanager
    async def reader(self, start: Mapping[TopicPartition, int | None]) -> AsyncIterator[Reader]:
        self.check_open()
        logs = {partition: self.partition_log(partition) for partition in start}
        with self.watching(_Cursor()) as cursor:
            cursor.move({p: logs[p].end if offset is None else offset for p, offset in start.items()}, logs)
            yield _MemoryReader(self, cursor)

    async def kept(self, partition: TopicPartition) -> range:
        self.check_open()
        log = self.partition_log(partition)
        return range(log.start, log.end)

    @asynccontextmanager
    async def join(self, group: str, topics: Sequence[Topic], *, incarnation: int = 0) -> AsyncIterator[Member]:
        self.check_open()
        partitions = [partition for topic in topics for partition in topic.partitions]
        logs = {partition: self.partition_log(partition) for partition in partitions}
        joined = self._groups.setdefault(group, _Group(group))
        with self.watching(_Cursor()) as cursor:
            member = MemoryMember(self, joined, cursor, logs, incarnation)
            joined.add(member)
            try:
                yield member
            finally:
                joined.remove(member)

    async def group_members(self, group: str) -> dict[str, frozenset[TopicPartition]]:
        self.check_open()
        return {member.member_id: member.ownership.partitions for member in self.members(group)}

    async def lag(self, group: str, topics: Sequence[Topic]) -> dict[TopicPartition, Lag]:
        self.check_open()
        committed = self._groups[group].committed if group in self._groups else {}
        partitions = [partition for topic in topics for partition in topic.partitions]
        logs = map(self.partition_log, partitions)
        return {p: Lag(log.end, committed.get(p), log.start) for p, log in zip(partitions, logs, strict=True)}

    def members(self, group: str) -> list[MemoryMember]:
        """The group's live members in the order they joined, for tests that freeze one."""
        return list(self._groups[group].members) if group in self._groups else []

    @contextmanager
    def frozen(self, member: MemoryMember) -> Iterator[None]:
        """Within the block this member is as one whose process froze for too long: the group throws it out and goes on
        without it, while it believes what it believed and its `read` takes nothing. Afterwards `read` finds out, joins
        again as a new member and returns with the new `ownership`. For tests."""
        member.freeze()
        try:
            yield
        finally:
            member.thaw()

    def check_open(self) -> None:
        """Raises Unavailable unless the bus is open."""
        if not self._open:
            raise Unavailable("the in-memory log is closed")

    def partition_log(self, partition: TopicPartition) -> _PartitionLog:
        return self._log(partition).partitions[partition.partition]

    def _log(self, partition: TopicPartition) -> _TopicLog:
        log = self._logs.get(partition.topic)
        if log is None or not 0 <= partition.partition < len(log.partitions):
            raise ConfigurationError(f"the log has no partition {partition.partition} of a topic {partition.topic}")
        return log

    @contextmanager
    def watching(self, cursor: _Cursor) -> Iterator[_Cursor]:
        """A cursor that the end of the bus wakes, forgotten with the block."""
        self._cursors.add(cursor)
        try:
            yield cursor
        finally:
            self._cursors.remove(cursor)
            cursor.move({}, {})


@dataclass(slots=True)
class _PartitionLog:
    """One partition: the records from `start` to `end`, and who waits for more."""

    start: int = 0
    end: int = 0
    records: dict[int, Record] = field(default_factory=dict)
    cursors: set[_Cursor] = field(default_factory=set)


class _TopicLog:
    """One topic: its partitions, and which record is the oldest."""

    def __init__(self, topic: Topic, max_bytes: int) -> None:
        self.partitions = [_PartitionLog() for _ in range(topic.num_partitions)]
        self._max_bytes = max_bytes
        self._bytes = 0
        self._ages: deque[tuple[_PartitionLog, int]] = deque()  # partition and size of each record, oldest first

    def append(self, partition: TopicPartition, value: bytes, *, key: bytes | None, headers: Headers, size: int) -> int:
        log = self.partitions[partition.partition]
        offset = log.end
        log.records[offset] = Record(
            topic=partition.topic,
            partition=partition.partition,
            offset=offset,
            timestamp_ms=time.time_ns() // 1_000_000,
            value=bytes(value),
            key=key,
            headers=headers,
        )
        log.end += 1
        self._ages.append((log, size + RECORD_OVERHEAD_BYTES))
        self._bytes += size + RECORD_OVERHEAD_BYTES
        self._drop_oldest()
        for cursor in log.cursors:
            cursor.wake.set()
        return offset

    def _drop_oldest(self) -> None:
        while self._bytes > self._max_bytes and len(self._ages) > 1:
            log, size = self._ages.popleft()
            del log.records[log.start]
            log.start += 1
            self._bytes -= size


class _Cursor:
    """Where somebody reads: a position in each of some partitions, and the event that says there is news."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.positions: dict[TopicPartition, int] = {}
        self._logs: Mapping[TopicPartition, _PartitionLog] = {}
        self._turns: deque[TopicPartition] = deque()  # whose turn it is to be read first

    def move(self, positions: dict[TopicPartition, int], logs: Mapping[TopicPartition, _PartitionLog]) -> None:
        """From now on reads these partitions from these positions."""
        for partition in self.positions:
            self._logs[partition].cursors.discard(self)
        self.positions, self._logs, self._turns = positions, logs, deque(positions)
        for partition in positions:
            logs[partition].cursors.add(self)
        self.wake.set()

    def outside(self) -> TopicPartition | None:
        """A partition whose position is no longer, or not yet, in its log."""
        for partition, position in self.positions.items():
            if not self._logs[partition].start <= position <= self._logs[partition].end:
                return partition
        return None

    def take(self, max_records: int) -> list[Record]:
        """Up to `max_records` records. Each partition in its turn, so that a busy one does not starve the others."""
        taken: list[Record] = []
        for _ in range(len(self._turns)):
            if len(taken) == max_records:
                break
            partition = self._turns[0]
            self._turns.rotate(-1)
            first, log = self.positions[partition], self._logs[partition]
            after = min(log.end, first + max_records - len(taken))
            taken.extend(log.records[offset] for offset in range(first, after))
            self.positions[partition] = after
        return taken

    def skip_dropped(self) -> None:
        """Moves on to the oldest record kept wherever the one wanted was dropped."""
        for partition, position in self.positions.items():
            self.positions[partition] = max(position, self._logs[partition].start)


class _MemoryReader:
    """A `Reader` of a `MemoryBus`."""

    def __init__(self, bus: MemoryBus, cursor: _Cursor) -> None:
        self._bus = bus
        self._cursor = cursor

    async def read(self, *, max_records: int = 1024, timeout: float | None = None) -> list[Record]:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self._cursor.wake.clear()
                    self._bus.check_open()
                    if (outside := self._cursor.outside()) is not None:
                        raise Unavailable(
                            f"{outside.topic}[{outside.partition}] does not hold offset "
                            f"{self._cursor.positions[outside]}: it was dropped to bound memory, or never written"
                        )
                    if records := self._cursor.take(max_records):
                        return records
                    await self._cursor.wake.wait()
        except TimeoutError:
            return []

    def position(self, partition: TopicPartition) -> int:
        return self._cursor.positions[partition]


class _Group:
    """What a broker's coordinator knows of one group."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.committed: dict[TopicPartition, Position] = {}
        self.members: list[MemoryMember] = []
        self._generation = 0
        self._num_joins = 0

    def add(self, member: MemoryMember) -> None:
        if self.members and self.members[0].subscription != member.subscription:
            raise ConfigurationError(f"all members of group {self.name} must join for the same topics")
        self._num_joins += 1
        member.member_id = f"{self.name}-{self._num_joins}"
        self.members.append(member)
        self._rebalance()

    def remove(self, member: MemoryMember) -> None:
        """Does nothing where the member was thrown out before."""
        if member in self.members:
            self.members.remove(member)
            self._rebalance()

    def _rebalance(self) -> None:
        self._generation += 1
        if not self.members:
            return
        shares = assign(sorted(self.members[0].subscription), [member.ownership.partitions for member in self.members])
        for member, share in zip(self.members, shares, strict=True):
            member.take_part(share, self._generation)


def assign(
    partitions: Sequence[TopicPartition], owned: Sequence[Collection[TopicPartition]]
) -> list[frozenset[TopicPartition]]:
    """Shares partitions among members, given what each owned so far: as evenly as can be, and with as few changes of
    owner as that leaves. The result has the order of `owned`."""
    share, num_larger = divmod(len(partitions), len(owned))
    held = [[p for p in partitions if p in mine] for mine in owned]
    # Whoever held most may keep one more.
    larger = sorted(range(len(owned)), key=lambda member: -len(held[member]))[:num_larger]
    sizes = [share + (member in larger) for member in range(len(owned))]
    kept = [mine[:size] for mine, size in zip(held, sizes, strict=True)]
    taken = {p for mine in kept for p in mine}
    free = iter([p for p in partitions if p not in taken])
    return [
        frozenset(mine) | {next(free) for _ in range(size - len(mine))} for mine, size in zip(kept, sizes, strict=True)
    ]


class MemoryMember:
    """A `Member` of a group on a `MemoryBus`."""

    def __init__(
        self,
        bus: MemoryBus,
        group: _Group,
        cursor: _Cursor,
        logs: Mapping[TopicPartition, _PartitionLog],
        incarnation: int,
    ) -> None:
        self.subscription = frozenset(logs)
        self._bus = bus
        self._group = group
        self._cursor = cursor
        self._logs = logs
        self._incarnation = incarnation
        self._ownership = NOTHING_OWNED
        self._met = NOTHING_OWNED  # the ownership that held when `read` last returned
        self._running = asyncio.Event()
        self._running.set()
        # Set by the group
        self.member_id = ""

    @property
    def ownership(self) -> Ownership:
        return self._ownership

    async def read(self, *, max_records: int, timeout: float | None = None) -> list[Record]:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._running.wait()
                    self._cursor.wake.clear()
                    self._bus.check_open()
                    if self not in self._group.members:
                        self._join_again()
                    if self._met is not self._ownership:
                        self._met = self._ownership
                        return []
                    self._cursor.skip_dropped()
                    if records := self._cursor.take(max_records):
                        return records
                    await self._cursor.wake.wait()
        except TimeoutError:
            return []

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        self._bus.check_open()
        if self not in self._group.members:
            raise NotOwner(f"group {self._group.name} threw this member out")
        check_commit(positions, met=self._met, current=self._ownership)
        self._group.committed.update(positions)

    async def committed(self) -> dict[TopicPartition, Position]:
        self._bus.check_open()
        return {p: self._group.committed[p] for p in self._ownership.partitions if p in self._group.committed}

    def take_part(self, share: frozenset[TopicPartition], generation: int) -> None:
        """A rebalance gave this member its share: reads it from the committed positions."""
        self._ownership = Ownership(share, generation, self.member_id, self._incarnation)
        start = {p: self._group.committed.get(p, Position(0)).offset for p in sorted(share)}
        self._cursor.move(start, self._logs)

    def freeze(self) -> None:
        self._running.clear()
        self._group.remove(self)

    def thaw(self) -> None:
        self._running.set()
        self._cursor.wake.set()

    def _join_again(self) -> None:
        self._ownership = NOTHING_OWNED
        self._group.add(self)
