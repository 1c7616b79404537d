"""The log in Kafka: the bus of the mesh, and the only module that knows aiokafka.

What aiokafka 0.14 does beside what `holdfast.bus` promises, and what this module does about it:

* Its consumers rebalance in the background. A commit on its way while the group gets a new generation is answered with
  an error that makes aiokafka leave the group; so commits and rebalances exclude each other here.
* Only a listener learns of a rebalance, and only private fields tell its generation and member id. They are read at one
  place, `_KafkaMember.on_partitions_assigned`.
* A member that is not inside `getmany` for five minutes leaves the group; so a read of no records waits in `getmany`,
  for a partition that no log has.
* A cancelled `getmany` leaves a future behind until the next record; so timeouts are given to it, not put around it.
* Its sticky assignor keeps its state in the class, for all consumers of a process; so every member has its own class.
* An idempotent send is repeated for ever, and a failed one leaves a gap in the sequence numbers that fails all later
  ones; so acks have a time limit here, and a producer is replaced after any failure.
* A full batch lets later sends overtake those that wait; so sends to one partition take turns.
* Its consumers and its admin client take a coordinator that is not ready for one that knows no commits, and a consumer
  then goes to the beginning; so what is missing is asked for again, and members are sent to their positions.
* On uvloop a connection that has just broken says RuntimeError, which it does not expect, and a consumer never recovers
  from (aio-libs/aiokafka#1038); so connections here say what it expects.
* Asking a broker for a topic's metadata may create it with one partition; so topics are looked up in the list of all.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiokafka
import structlog
from aiokafka import conn, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

from holdfast.bus import (
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
from holdfast.topics import REQUESTS_BATCH, Topic

T = TypeVar("T")

log = structlog.get_logger(__name__)

REPLICAS: Final = 3
"""Copies of a new topic's records, where there are so many brokers."""

START_SECONDS: Final = 10.0
"""How long a broker may take to answer when the bus is opened."""

ASK_SECONDS: Final = 10.0
"""How long a question about topics, groups and offsets may take, retries included."""

COMMIT_SECONDS: Final = 5.0
"""How long a commit may take; less than the rebalance timeout, which it can hold up."""

RETRY_SECONDS: Final = 0.05
"""The pause before a broker that said "not yet" is asked again."""

GETMANY_MS: Final = 3_600_000
"""The longest single wait for records; a read without a timeout waits again."""

GRACE_SECONDS: Final = 0.1
"""How much longer than asked a member's read may take, when its timeout ends in the middle of a rebalance."""


class _Connection(conn.AIOKafkaConnection):  # type: ignore[misc]
    """Takes a transport that is closed for a connection that is broken, as every kind of it is."""

    def send(self, request: Any, expect_response: bool = True) -> Any:
        try:
            return super().send(request, expect_response)
        except RuntimeError as error:
            self.close(reason=conn.CloseReason.CONNECTION_BROKEN)
            raise errors.KafkaConnectionError(f"Connection at {self.host}:{self.port} broken: {error}") from error


conn.AIOKafkaConnection = _Connection  # aiokafka's clients connect by it, and have no other way to be told

_NOWHERE: Final = aiokafka.TopicPartition("", 0)


@dataclass(frozen=True, slots=True)
class _Names:
    """What topics are called in the cluster, and the translation of what carries their names."""

    prefix: str

    def theirs(self, partition: TopicPartition) -> aiokafka.TopicPartition:
        return aiokafka.TopicPartition(self.prefix + partition.topic, partition.partition)

    def ours(self, partition: aiokafka.TopicPartition) -> TopicPartition:
        return TopicPartition(partition.topic.removeprefix(self.prefix), partition.partition)

    def assigned(self, assignment: bytes) -> frozenset[TopicPartition]:
        """The partitions that a coordinator says it gave a member; it says nothing while its group rebalances."""
        if not assignment:
            return frozenset()
        return frozenset(map(self.ours, ConsumerProtocolMemberAssignment.decode(assignment).partitions()))

    def records(self, batches: Mapping[aiokafka.TopicPartition, Sequence[aiokafka.ConsumerRecord]]) -> list[Record]:
        return [
            Record(
                topic=record.topic.removeprefix(self.prefix),
                partition=record.partition,
                offset=record.offset,
                timestamp_ms=record.timestamp,
                value=record.value or b"",
                key=record.key,
                headers=tuple(record.headers),
            )
            for batch in batches.values()
            for record in batch
        ]


class KafkaBus:
    """A `Bus` on a Kafka cluster. Use it as an async context manager, outside of everything that reads and sends.

    Entering raises:
        ConfigurationError: `bootstrap` is not `host:port,host:port`.
        Unavailable: none of these brokers answers.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        client_id: str = "holdfast",
        namespace: str = "",
        send_timeout: float = 10.0,
        session_timeout: float = 6.0,
        heartbeat: float = 0.25,
    ) -> None:
        """`namespace`: stands before the names of all topics and groups in the cluster, so that several meshes can share
        it. `send_timeout`: seconds until an ack that has not come counts as `Unavailable`. `session_timeout`: seconds of
        silence after which a group throws a member out. `heartbeat`: seconds between two signs of life, which is also
        what it takes members to learn of a rebalance."""
        self._bootstrap = bootstrap
        self._client: dict[str, Any] = {"bootstrap_servers": bootstrap, "client_id": client_id}
        self._session = {
            "session_timeout_ms": int(session_timeout * 1000),
            "heartbeat_interval_ms": int(heartbeat * 1000),
        }
        self._names = _Names(f"{namespace}." if namespace else "")
        self._num_partitions: dict[str, int] = {}
        self._send_timeout = send_timeout
        self._resources = AsyncExitStack()
        self._open = False

    async def __aenter__(self) -> Self:
        _check_addresses(self._bootstrap)
        async with AsyncExitStack() as resources:
            self._admin = AIOKafkaAdminClient(**self._client, request_timeout_ms=int(ASK_SECONDS * 1000))
            resources.push_async_callback(self._admin.close)
            self._offsets = aiokafka.AIOKafkaConsumer(**self._client, request_timeout_ms=int(ASK_SECONDS * 1000))
            resources.push_async_callback(_stop, self._offsets)
            self._interactive = await resources.enter_async_context(
                _Sender(self._new_producer, self._names, self._send_timeout)
            )
            self._bulk = await resources.enter_async_context(
                _Sender(self._new_producer, self._names, self._send_timeout)
            )
            with _reported(f"no Kafka broker answers at {self._bootstrap}"):
                await _start(self._admin)
                await _start(self._offsets)
            self._resources = resources.pop_all()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        await self._resources.aclose()

    async def create_topics(self, topics: Sequence[Topic]) -> None:
        existing = await self._ask(self._list_topics)
        missing = [topic for topic in topics if topic.name not in existing]
        if missing:
            await self._ask(lambda: self._create(missing))
            existing = await self._ask(lambda: self._find(topics))
        for topic in topics:
            if existing[topic.name] != topic.num_partitions:
                raise ConfigurationError(
                    f"topic {topic.name} exists with {existing[topic.name]} partitions, not {topic.num_partitions}"
                )

    async def send(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int]:
        check_record(value, key=key, headers=headers)
        await self._check_partitions([partition])
        # A producer has one request on its way to each broker: bulk must not fill the one that people wait for.
        sender = self._bulk if partition.topic == REQUESTS_BATCH.name else self._interactive
        return await sender.send(partition, value, key=key, headers=headers)

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        return await (await self.send(partition, value, key=key, headers=headers))

    @asynccontextmanager
    async def reader(self, start: Mapping[TopicPartition, int | None]) -> AsyncIterator[Reader]:
        await self._check_partitions(start)
        ends = await self._ends([partition for partition, offset in start.items() if offset is None])
        positions = {partition: ends[partition] if offset is None else offset for partition, offset in start.items()}
        consumer = aiokafka.AIOKafkaConsumer(
            **self._client,
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=100,
        )
        async with _started(consumer, self._bootstrap):
            # Nothing is fetched between the two: there is no await.
            consumer.assign(list(map(self._names.theirs, positions)))
            for partition, offset in positions.items():
                consumer.seek(self._names.theirs(partition), offset)
            yield _KafkaReader(consumer, self._names, positions)

    async def kept(self, partition: TopicPartition) -> range:
        await self._check_partitions([partition])
        # In this order, so that the end does not lie before the beginning.
        beginnings = await self._beginnings([partition])
        ends = await self._ends([partition])
        return range(beginnings[partition], ends[partition])

    @asynccontextmanager
    async def join(self, group: str, topics: Sequence[Topic], *, incarnation: int = 0) -> AsyncIterator[Member]:
        await self._check_partitions(partition for topic in topics for partition in topic.partitions)
        assignor = _own_assignor()
        consumer = aiokafka.AIOKafkaConsumer(
            **self._client,
            **self._session,
            group_id=self._names.prefix + group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=25,
            fetch_min_bytes=1,
            rebalance_timeout_ms=10_000,
            max_poll_interval_ms=300_000,
            partition_assignment_strategy=(assignor,),
        )
        async with _started(consumer, self._bootstrap):
            member = _KafkaMember(self, group, consumer, self._names, assignor, incarnation)
            consumer.subscribe([self._names.prefix + topic.name for topic in topics], listener=member)
            yield member

    async def group_members(self, group: str) -> dict[str, frozenset[TopicPartition]]:
        answer: dict[str, bytes] = await self._ask(lambda: self._describe_members(self._names.prefix + group))
        return {member_id: self._names.assigned(assignment) for member_id, assignment in answer.items()}

    async def lag(self, group: str, topics: Sequence[Topic]) -> dict[TopicPartition, Lag]:
        partitions = [partition for topic in topics for partition in topic.partitions]
        await self._check_partitions(partitions)
        # In this order, so that no end lies before a position committed meanwhile, or before the beginning.
        committed = await self.committed(group, partitions)
        beginnings = await self._beginnings(partitions)
        ends = await self._ends(partitions)
        return {each: Lag(ends[each], committed.get(each), beginnings[each]) for each in partitions}

    async def committed(self, group: str, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, Position]:
        """What the group has committed in these partitions.

        Raises:
            Unavailable: the log cannot be reached.
        """
        wanted = list(map(self._names.theirs, partitions))
        if not wanted:
            return {}
        answer = await self._ask(lambda: self._fetch_committed(self._names.prefix + group, wanted))
        return {
            self._names.ours(partition): Position(kept.offset, kept.metadata or "")
            for partition, kept in answer.items()
            if kept.offset >= 0
        }

    async def _fetch_committed(
        self, group: str, partitions: list[aiokafka.TopicPartition]
    ) -> dict[aiokafka.TopicPartition, aiokafka.OffsetAndMetadata]:
        """What was committed in each of these partitions, -1 where nothing was."""
        answer: dict[aiokafka.TopicPartition, aiokafka.OffsetAndMetadata]
        answer = await self._admin.list_consumer_group_offsets(group, partitions=partitions)
        # A coordinator that is not ready answers with an error for the whole group, which aiokafka does not look at.
        if len(answer) < len(partitions):
            raise errors.GroupLoadInProgressError
        return answer

    async def _describe_members(self, group: str) -> dict[str, bytes]:
        """What the coordinator keeps for each member as its assignment."""
        (answer,) = await self._admin.describe_consumer_groups([group])
        ((code, _name, _state, _protocol_type, _protocol, members, *_rest),) = answer.groups
        if code:
            raise errors.for_code(code)
        return {member_id: assignment for member_id, _client, _host, _metadata, assignment, *_ in members}

    async def _beginnings(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """The offset of the oldest record that each partition keeps."""
        beginnings = await self._ask(lambda: self._offsets.beginning_offsets(list(map(self._names.theirs, partitions))))
        return {self._names.ours(partition): beginning for partition, beginning in beginnings.items()}

    async def _ends(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """The offset that the next record of each partition will get."""
        ends = await self._ask(lambda: self._offsets.end_offsets(list(map(self._names.theirs, partitions))))
        return {self._names.ours(partition): end for partition, end in ends.items()}

    async def _check_partitions(self, partitions: Iterable[TopicPartition]) -> None:
        """Raises ConfigurationError unless the log has all of these."""
        self._check_open()
        for topic, partition in partitions:
            if topic not in self._num_partitions:
                await self._ask(self._list_topics)
            if not 0 <= partition < self._num_partitions.get(topic, 0):
                raise ConfigurationError(f"the log has no partition {partition} of a topic {self._names.prefix}{topic}")

    async def _list_topics(self) -> dict[str, int]:
        """All topics of the log and how many partitions each has."""
        topics = await self._admin.describe_topics()
        prefix = self._names.prefix
        self._num_partitions = {
            topic["topic"].removeprefix(prefix): len(topic["partitions"])
            for topic in topics
            if topic["topic"].startswith(prefix)
        }
        return self._num_partitions

    async def _find(self, topics: Sequence[Topic]) -> dict[str, int]:
        """As `_list_topics`; raises a retriable error while one of these is not there."""
        existing = await self._list_topics()
        if any(topic.name not in existing for topic in topics):
            raise errors.StaleMetadata
        return existing

    async def _create(self, topics: Sequence[Topic]) -> None:
        num_brokers = len((await self._admin.describe_cluster())["brokers"])
        replicas = min(REPLICAS, num_brokers)
        answer = await self._admin.create_topics([_new_topic(self._names, topic, replicas) for topic in topics])
        for _name, code, message in answer.topic_errors:
            kind = errors.for_code(code)
            # Another service may have been faster.
            if kind not in (errors.NoError, errors.TopicAlreadyExistsError):
                raise kind(message)

    async def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer of a broker, asked again for at most ASK_SECONDS while it says "not yet"."""
        self._check_open()
        with _reported(f"the Kafka brokers at {self._bootstrap} do not answer"):
            async with asyncio.timeout(ASK_SECONDS):
                while True:
                    try:
                        return await question()
                    except errors.KafkaError as error:
                        if not error.retriable:
                            raise
                        log.debug("asking kafka again", error=repr(error))
                    await asyncio.sleep(RETRY_SECONDS)

    def _check_open(self) -> None:
        if not self._open:
            raise Unavailable(f"the connection to Kafka at {self._bootstrap} is closed")

    def _new_producer(self) -> aiokafka.AIOKafkaProducer:
        return aiokafka.AIOKafkaProducer(
            **self._client,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=262_144,
            request_timeout_ms=10_000,
            retry_backoff_ms=50,
        )


class _Sender:
    """Sends to the log through an idempotent producer, and replaces that after a failure. Entered before the first send;
    leaving waits for outstanding acks as long as one may take, then fails them."""

    def __init__(self, new_producer: Callable[[], aiokafka.AIOKafkaProducer], names: _Names, timeout: float) -> None:
        self._new_producer = new_producer
        self._names = names
        self._timeout = timeout
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._failed = False
        self._replacing = asyncio.Lock()
        self._turns: defaultdict[TopicPartition, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._replacing:
            await self._close()

    async def send(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None, headers: Headers
    ) -> asyncio.Future[int]:
        """As `Bus.send`."""
        topic, number = self._names.theirs(partition)
        with _reported(f"{partition.topic}[{partition.partition}] takes no record"):
            async with asyncio.timeout(self._timeout), self._turns[partition]:
                producer = await self._working_producer()
                try:
                    sent = await producer.send(topic, value, key=key, partition=number, headers=list(headers))
                except errors.KafkaTimeoutError:
                    raise  # the buffer is full; the producer is well
                except errors.KafkaError:
                    self._give_up(producer)
                    raise
        return self._acked(producer, sent, partition)

    async def _working_producer(self) -> aiokafka.AIOKafkaProducer:
        async with self._replacing:
            if self._failed:
                await self._close()
            if self._producer is None:
                self._producer = self._new_producer()
                try:
                    await _start(self._producer)
                except BaseException:
                    await self._close()
                    raise
            return self._producer

    def _give_up(self, producer: aiokafka.AIOKafkaProducer) -> None:
        """The next send gets a new producer. What this one still holds will fail, or is there."""
        if producer is self._producer:
            self._failed = True

    async def _close(self) -> None:
        producer, self._producer, self._failed = self._producer, None, False
        if producer is None:
            return
        # `stop` waits until everything is sent, for ever if no broker comes back; it gives up when its sender task ends.
        sender = producer._sender.sender_task
        limit = asyncio.get_running_loop().call_later(self._timeout, sender.cancel) if sender is not None else None
        try:
            await producer.stop()
        finally:
            if limit is not None:
                limit.cancel()
            # Whoever still waits for an ack of it.
            producer._message_accumulator.fail_all(errors.ProducerClosed())

    def _acked(
        self, producer: aiokafka.AIOKafkaProducer, sent: asyncio.Future[Any], partition: TopicPartition
    ) -> asyncio.Future[int]:
        """A future of the offset that fails after the send timeout: the producer itself would repeat for ever."""
        loop = asyncio.get_running_loop()
        acked: asyncio.Future[int] = loop.create_future()
        where = f"{partition.topic}[{partition.partition}]"

        def expire() -> None:
            if not acked.done():
                acked.set_exception(
                    Unavailable(f"{where} gave no ack within {self._timeout} s; it may have the record")
                )

        def settle(sent: asyncio.Future[Any]) -> None:
            limit.cancel()
            error = sent.exception()
            if error is not None:
                self._give_up(producer)
            if acked.done():
                return
            if error is not None:
                failure = Unavailable(f"{where} gave no ack: {error!r}; it may have the record")
                failure.__cause__ = error
                acked.set_exception(failure)
            elif sent.result().offset < 0:
                acked.set_exception(Unavailable(f"{where} has the record, but does not say where"))
            else:
                acked.set_result(sent.result().offset)

        limit = loop.call_later(self._timeout, expire)
        sent.add_done_callback(settle)
        acked.add_done_callback(_seen)
        return acked


def _seen(acked: asyncio.Future[int]) -> None:
    """Who sent many records may stop at the first that failed: what became of the others is no news."""
    if not acked.cancelled():
        acked.exception()


class _KafkaReader:
    """A `Reader` of a `KafkaBus`."""

    def __init__(
        self, consumer: aiokafka.AIOKafkaConsumer, names: _Names, positions: dict[TopicPartition, int]
    ) -> None:
        self._consumer = consumer
        self._names = names
        self._positions = positions

    async def read(self, *, max_records: int = 1024, timeout: float | None = None) -> list[Record]:
        deadline = _deadline(timeout)
        while True:
            try:
                batches = await self._consumer.getmany(timeout_ms=_left_ms(deadline), max_records=max_records)
            except errors.OffsetOutOfRangeError as error:
                raise Unavailable(f"the log no longer holds, or never held, {error}") from error
            except errors.KafkaError as error:
                raise Unavailable(f"the log cannot be read: {error!r}") from error
            records = self._names.records(batches)
            for record in records:
                self._positions[record.topic_partition] = record.offset + 1
            if records or _left_ms(deadline) == 0:
                return records

    def position(self, partition: TopicPartition) -> int:
        return self._positions[partition]


class _KafkaMember(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A `Member` of a group on a `KafkaBus`.

    A rebalance begins with `on_partitions_revoked` and ends with `on_partitions_assigned`, both called by the consumer's
    background task. Between them nothing is read (aiokafka sees to that) and nothing is committed.
    """

    def __init__(
        self,
        bus: KafkaBus,
        group: str,
        consumer: aiokafka.AIOKafkaConsumer,
        names: _Names,
        assignor: type[StickyPartitionAssignor],
        incarnation: int,
    ) -> None:
        self._bus = bus
        self._group = group
        self._consumer = consumer
        self._names = names
        self._assignor = assignor
        self._incarnation = incarnation
        self._ownership = NOTHING_OWNED
        self._met = NOTHING_OWNED  # the ownership that held when `read` last returned
        self._commits = asyncio.Lock()  # held by a commit, or by a rebalance
        self._taking: asyncio.Timeout | None = None  # what the end of a rebalance interrupts

    @property
    def ownership(self) -> Ownership:
        return self._ownership

    async def read(self, *, max_records: int, timeout: float | None = None) -> list[Record]:
        deadline = _deadline(timeout)
        while True:
            if self._met is not (ownership := self._ownership):
                await self._go_to_committed(ownership)
                self._met = ownership
                return []
            records = await self._take(max_records, deadline)
            if records or (_left_ms(deadline) == 0 and self._met is self._ownership):
                return records

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        theirs = {self._names.theirs(p): aiokafka.OffsetAndMetadata(*position) for p, position in positions.items()}
        with _reported(f"group {self._group} cannot commit"):
            async with asyncio.timeout(COMMIT_SECONDS), self._commits:
                check_commit(positions, met=self._met, current=self._ownership)
                try:
                    await self._consumer.commit(theirs)
                except (errors.CommitFailedError, errors.IllegalStateError) as error:
                    raise NotOwner(f"group {self._group} went on without this member") from error

    async def committed(self) -> dict[TopicPartition, Position]:
        return await self._bus.committed(self._group, self._ownership.partitions)

    async def on_partitions_revoked(self, revoked: object) -> None:
        """A rebalance begins. Called by aiokafka; the group waits for this member until it returns."""
        await self._commits.acquire()

    def on_partitions_assigned(self, assigned: Iterable[aiokafka.TopicPartition]) -> None:
        """A rebalance ends. Called by aiokafka, before the first record of what is owned now can be read."""
        coordinator = self._consumer._coordinator
        self._assignor.on_generation_assignment(coordinator.generation)
        self._ownership = Ownership(
            frozenset(map(self._names.ours, assigned)), coordinator.generation, coordinator.member_id, self._incarnation
        )
        self._commits.release()
        # A `_take` that waits ends. Even one that is about to get records loses none: cancelled, it takes nothing.
        if self._taking is not None and not self._taking.expired():
            self._taking.reschedule(asyncio.get_running_loop().time())

    async def _go_to_committed(self, ownership: Ownership) -> None:
        """Reads from the committed positions on. Where there is none, aiokafka goes to the beginning."""
        for partition, position in (await self._bus.committed(self._group, ownership.partitions)).items():
            if ownership is self._ownership:
                self._consumer.seek(self._names.theirs(partition), position.offset)

    async def _take(self, max_records: int, deadline: float | None) -> list[Record]:
        """Records of what is owned; [] at the deadline, or because a rebalance ended."""
        where = () if max_records else (_NOWHERE,)
        try:
            async with asyncio.timeout_at(deadline and deadline + GRACE_SECONDS) as self._taking:
                batches = await self._consumer.getmany(
                    *where, timeout_ms=_left_ms(deadline), max_records=max_records or None
                )
        except TimeoutError:
            return []
        except errors.KafkaError as error:
            if not error.retriable:
                raise Unavailable(f"group {self._group} cannot be read: {error!r}") from error
            log.warning("reading goes on", group=self._group, error=repr(error))
            return []
        finally:
            self._taking = None
        return self._names.records(batches)


@asynccontextmanager
async def _started(consumer: aiokafka.AIOKafkaConsumer, bootstrap: str) -> AsyncIterator[None]:
    try:
        with _reported(f"no Kafka broker answers at {bootstrap}"):
            await _start(consumer)
        yield
    finally:
        await _stop(consumer)


async def _start(client: aiokafka.AIOKafkaConsumer | aiokafka.AIOKafkaProducer | AIOKafkaAdminClient) -> None:
    """Raises TimeoutError after START_SECONDS. Cancelled while it asks its first broker for the others, a client would
    forget that connection with its socket open."""

    async def start() -> None:
        async with asyncio.timeout(START_SECONDS):
            await client.start()

    await _to_the_end(start())


async def _stop(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """Leaves the group and closes the connections. Half stopped, a consumer would fetch on, and its group would wait for
    it."""
    await _to_the_end(_stop_all(consumer))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Does the work to its end even where the caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _stop_all(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """aiokafka cancels its fetches one by one, and where one did not run yet, or waits for a broker which is away, lets
    the cancellation out as if it were ours: with the others still running, and its connections still open."""
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        fetches = set(consumer._fetcher._pending_tasks) if consumer._fetcher else set()
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        await consumer._client.close()


@contextmanager
def _reported(failure: str) -> Iterator[None]:
    """What aiokafka raises becomes Unavailable."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable(f"{failure}: out of time") from error
    except (errors.KafkaError, OSError) as error:
        raise Unavailable(f"{failure}: {error!r}") from error


def _check_addresses(bootstrap: str) -> None:
    for address in bootstrap.split(","):
        host, _, port = address.strip().rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigurationError(f"Kafka brokers are given as host:port,host:port, not {bootstrap!r}")


def _new_topic(names: _Names, topic: Topic, replicas: int) -> NewTopic:
    retention_ms = str(int(topic.retention.total_seconds() * 1000))
    return NewTopic(
        names.prefix + topic.name,
        topic.num_partitions,
        replicas,
        topic_configs={
            "cleanup.policy": "delete",
            "retention.ms": retention_ms,
            "segment.ms": retention_ms,  # only whole segments go: a record stays for twice its retention at most
            "message.timestamp.type": "LogAppendTime",
            "min.insync.replicas": str(max(1, replicas - 1)),
            "unclean.leader.election.enable": "false",
        },
    )


def _own_assignor() -> type[StickyPartitionAssignor]:
    """A class of its own: aiokafka's keeps what a member owned in class attributes."""
    return type("OwnStickyPartitionAssignor", (StickyPartitionAssignor,), {})


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


def _left_ms(deadline: float | None) -> int:
    """Milliseconds to the deadline, rounded up, for one call of `getmany`."""
    if deadline is None:
        return GETMANY_MS
    return min(GETMANY_MS, max(0, math.ceil((deadline - asyncio.get_running_loop().time()) * 1000)))
