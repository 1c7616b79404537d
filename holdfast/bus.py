"""The log that joins the services: what a bus promises, whichever one it is.

A bus keeps **topics**, a topic keeps numbered **partitions**, a partition is a sequence of **records** with consecutive
meaning but not necessarily consecutive **offsets**. `holdfast.memory` and `holdfast.kafka` are the two buses; the same
tests hold both to these promises:

* **Nothing is lost after an ack.** When `publish` returns, or the future of `send` is done, every reader of the
  partition will meet the record, until the topic's retention. Before that the outcome is unknown: a send that failed or
  was cancelled may still be in the log. (Kafka: as durable as `acks=all` on the cluster at hand. Memory: until the
  process ends.)
* **Order.** Records that one bus object sends to one partition lie in the log in the order of the calls, without
  duplicates. All readers meet the records of a partition in the same order, that of their offsets.
* **Groups.** In a group every partition of the subscribed topics belongs to one live member at a time, as far as the
  members know: a member that froze may believe for a while that it owns what it lost. Whoever must exclude it compares
  `Ownership.epoch`: it rises with every change of owner.
* **At least once.** A group's new owner reads on from the committed position; what was read but not committed comes
  again. After a rebalance this holds for partitions that stayed, too.
* **Back-pressure.** `read(max_records=n)` never takes more than n records off the log's hands; what is not read stays
  there, for another member too. `send` waits while the bus's buffer is full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from holdfast.epochs import epoch_of
from holdfast.errors import NotOwner, RequestTooLarge

if TYPE_CHECKING:
    import asyncio

    from holdfast.topics import Topic

Headers = tuple[tuple[str, bytes], ...]
"""Names and values that travel beside a record's value, in order."""

MAX_RECORD_BYTES = 1_000_000
"""Most bytes of a record's value, key and headers together: what every bus takes, whatever its framing adds."""

MAX_METADATA_BYTES = 4_000
"""Most bytes of the text beside a committed position; a broker's default is 4,096."""


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Position(NamedTuple):
    """A committed position: the offset to read on from, and up to 4,000 bytes of text kept beside it."""

    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as it was read."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    """When it was appended, in milliseconds since the epoch."""
    value: bytes
    key: bytes | None = None
    headers: Headers = ()

    @property
    def topic_partition(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Ownership:
    """What a member owns from one rebalance to the next."""

    partitions: frozenset[TopicPartition]
    generation: int
    """Rises by one with every rebalance of the group."""
    member_id: str
    """The same as before iff the member was never thrown out in between."""
    incarnation: int = 0
    """From configuration; raised when the group is made anew and its generation starts again."""

    @property
    def epoch(self) -> int:
        """That of whoever gains a partition now: higher for every later owner (`holdfast.epochs`)."""
        return epoch_of(self.incarnation, self.generation)

    def continues(self, earlier: Ownership) -> bool:
        """Whether nobody else can have owned, in between, a partition that both name."""
        return self.generation == earlier.generation + 1 and self.member_id == earlier.member_id

    def kept_since(self, earlier: Ownership) -> frozenset[TopicPartition]:
        """The partitions whose work may go on: owned then and now, and by nobody else in between. All others that were
        owned are lost, those that are owned again too: they are gained anew."""
        return self.partitions & earlier.partitions if self.continues(earlier) else frozenset()


NOTHING_OWNED = Ownership(partitions=frozenset(), generation=0, member_id="")
"""The ownership of a member that has not joined yet."""


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a group is behind in one partition."""

    end: int
    """The offset that the next record will get."""
    committed: Position | None = field(default=None)
    """Where the group would read on, None if it never committed."""
    start: int = 0
    """The offset of the oldest record that is kept."""


class Reader(Protocol):
    """Reads explicit partitions, alone: no group, no rebalance, no commits."""

    async def read(self, *, max_records: int = 1024, timeout: float | None = None) -> list[Record]:
        """The next records, at least one, as soon as there are some; [] after `timeout` seconds without any. A log that
        is away for a while is waited for. Cancelled, it has taken nothing.

        Raises:
            Unavailable: what was to be read is not, or no longer, kept; the log refuses; the bus is closed.
        """
        ...

    def position(self, partition: TopicPartition) -> int:
        """The offset from which the next `read` goes on. The partition's end is never below it."""
        ...


class Member(Protocol):
    """One member of a consumer group."""

    @property
    def ownership(self) -> Ownership:
        """What this member owns, as of the newest rebalance it took part in."""
        ...

    async def read(self, *, max_records: int, timeout: float | None = None) -> list[Record]:
        """As `Reader.read`, over the partitions owned. With `max_records=0` only waits: it takes no record, but takes
        part in rebalances; so a member that has no room still calls it.

        Returns as soon as `ownership` has changed, so that the caller meets the change before any record of it.
        All records of one call belong to the ownership that holds when the call returns.
        """
        ...

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Keep these positions for the group.

        Raises:
            NotOwner: a rebalance took one of the partitions away; nothing was kept.
            Unavailable: the log cannot be reached.
            ValueError: a position's metadata is longer than `MAX_METADATA_BYTES`.
        """
        ...

    async def committed(self) -> dict[TopicPartition, Position]:
        """What the group has committed in the partitions that this member owns."""
        ...


class Bus(Protocol):
    """A connection to the log; opened and closed as an async context manager by whoever composes a service.

    Everything that names a topic raises ConfigurationError where the log has no such partition, and Unavailable where
    the log cannot be reached or the bus is closed.
    """

    async def create_topics(self, topics: Sequence[Topic]) -> None:
        """Creates what is missing.

        Raises:
            ConfigurationError: a topic exists with another number of partitions.
            Unavailable: the log cannot be reached.
        """
        ...

    async def send(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int]:
        """Puts a record in its place in the order and returns a future of its offset, done when the log has it.
        Waits while the buffer is full.

        Raises:
            Unavailable: (also from the future) the log cannot be reached in time; the outcome is unknown.
            RequestTooLarge: the record is larger than `MAX_RECORD_BYTES`.
            ConfigurationError: there is no such partition.
        """
        ...

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        """`send`, and wait for the offset."""
        ...

    def reader(self, start: Mapping[TopicPartition, int | None]) -> AbstractAsyncContextManager[Reader]:
        """A reader of these partitions, each from the offset given, or from its end where that is None."""
        ...

    async def kept(self, partition: TopicPartition) -> range:
        """The offsets that the partition holds, from its oldest record's up to the next one's. On a broker the oldest
        may be gone a moment later."""
        ...

    def join(self, group: str, topics: Sequence[Topic], *, incarnation: int = 0) -> AbstractAsyncContextManager[Member]:
        """A member of a group that shares all partitions of these topics; all members of a group name the same topics.
        Partitions without a committed position are read from their beginning. The first `read` returns [] as soon as
        the member has joined. Leaving the block leaves the group at once. `incarnation` goes into every `Ownership`."""
        ...

    async def group_members(self, group: str) -> dict[str, frozenset[TopicPartition]]:
        """The ids of a group's members, and what each owns: while the group rebalances that may be nothing. One that died
        counts until the group throws it out. Empty where nobody ever joined."""
        ...

    async def lag(self, group: str, topics: Sequence[Topic]) -> dict[TopicPartition, Lag]:
        """How far a group is behind, for all partitions of these topics."""
        ...


def check_record(value: bytes, *, key: bytes | None, headers: Headers) -> int:
    """The bytes of a record.

    Raises:
        RequestTooLarge: more than `MAX_RECORD_BYTES`.
    """
    size = len(value) + len(key or b"") + sum(len(name.encode()) + len(content) for name, content in headers)
    if size > MAX_RECORD_BYTES:
        raise RequestTooLarge(f"a record of {size:,} bytes is more than the log takes, {MAX_RECORD_BYTES:,} bytes")
    return size


def check_commit(positions: Mapping[TopicPartition, Position], *, met: Ownership, current: Ownership) -> None:
    """Whether a member may commit: `met` is the ownership under which its caller last read, `current` the newest.

    Raises:
        NotOwner: one of the partitions was, or may have been, another member's since it was read.
        ValueError: a position's metadata is too long.
    """
    for partition, position in positions.items():
        if len(position.metadata.encode()) > MAX_METADATA_BYTES:
            raise ValueError(f"the metadata of {partition} is longer than {MAX_METADATA_BYTES} bytes")
        if partition not in met.partitions & current.partitions:
            raise NotOwner(f"{partition.topic}[{partition.partition}] belongs to another member of the group now")
    if current is not met and not current.continues(met):
        raise NotOwner(f"the group went from generation {met.generation} to {current.generation} meanwhile")
