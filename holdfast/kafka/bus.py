"""The bus on a Kafka cluster: records sent and read, groups joined, questions asked.

* A producer has one request on its way to each broker; so what is sent in bulk has one of its own.
* aiokafka's admin client takes a coordinator that is not ready for one that knows no commits; so what is missing is asked
  for again.
* Asking a broker for a topic's metadata may create it with one partition; so topics are looked up in the list of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import aiokafka
import structlog
from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from holdfast.bus import Headers, Lag, Member, Position, Reader, TopicPartition, check_record
from holdfast.errors import ConfigurationError, Unavailable
from holdfast.kafka.clients import reported, start, started, stop
from holdfast.kafka.member import KafkaMember, own_assignor
from holdfast.kafka.names import Names
from holdfast.kafka.reader import KafkaReader
from holdfast.kafka.sender import Sender
from holdfast.topics import REQUESTS_BATCH, Topic

log = structlog.get_logger(__name__)

REPLICAS: Final = 3
"""Copies of a new topic's records, where there are so many brokers."""

ASK_SECONDS: Final = 10.0
"""How long a question about topics, groups and offsets may take, retries included."""

RETRY_SECONDS: Final = 0.05
"""The pause before a broker that said "not yet" is asked again."""


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
        heartbeat: float = 0.1,
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
        self._names = Names(f"{namespace}." if namespace else "")
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
            resources.push_async_callback(stop, self._offsets)
            self._interactive = await resources.enter_async_context(
                Sender(self._new_producer, self._names, self._send_timeout)
            )
            self._bulk = await resources.enter_async_context(
                Sender(self._new_producer, self._names, self._send_timeout)
            )
            with reported(f"no Kafka broker answers at {self._bootstrap}"):
                await start(self._admin)
                await start(self._offsets)
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
        async with started(consumer, self._bootstrap):
            # Nothing is fetched between the two: there is no await.
            consumer.assign(list(map(self._names.theirs, positions)))
            for partition, offset in positions.items():
                consumer.seek(self._names.theirs(partition), offset)
            yield KafkaReader(consumer, self._names, positions)

    async def kept(self, partition: TopicPartition) -> range:
        await self._check_partitions([partition])
        # In this order, so that the end does not lie before the beginning.
        beginnings = await self._beginnings([partition])
        ends = await self._ends([partition])
        return range(beginnings[partition], ends[partition])

    @asynccontextmanager
    async def join(self, group: str, topics: Sequence[Topic], *, incarnation: int = 0) -> AsyncIterator[Member]:
        await self._check_partitions(partition for topic in topics for partition in topic.partitions)
        assignor = own_assignor()
        consumer = aiokafka.AIOKafkaConsumer(
            **self._client,
            **self._session,
            group_id=self._names.prefix + group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=25,
            fetch_min_bytes=1,
            rebalance_timeout_ms=10_000,
            retry_backoff_ms=50,
            max_poll_interval_ms=300_000,
            partition_assignment_strategy=(assignor,),
        )
        async with started(consumer, self._bootstrap):
            member = KafkaMember(
                group, consumer, self._names, assignor, incarnation, committed=partial(self.committed, group)
            )
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
        with reported(f"the Kafka brokers at {self._bootstrap} do not answer"):
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


def _check_addresses(bootstrap: str) -> None:
    for address in bootstrap.split(","):
        host, _, port = address.strip().rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigurationError(f"Kafka brokers are given as host:port,host:port, not {bootstrap!r}")


def _new_topic(names: Names, topic: Topic, replicas: int) -> NewTopic:
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
