"""What is true of the log in Kafka alone: brokers that are not there, that go away and that come back."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest
from aiokafka.protocol.metadata import MetadataRequest

from deploy.kafka import broker
from holdfast.bus import Position, TopicPartition
from holdfast.errors import ConfigurationError, Unavailable
from holdfast.kafka import KafkaBus, clients, member
from holdfast.kafka.clients import Client, Connection
from holdfast.topics import Topic
from tests.conftest import missing

LINE = Topic("line", 1, timedelta(hours=1))
PLACE = LINE.partition(0)


@asynccontextmanager
async def running(folder: Path, *, port: int = 0) -> AsyncIterator[str]:
    """A broker of the test's own, started and stopped without holding up the event loop."""
    with ExitStack() as stack:
        try:
            address = await asyncio.to_thread(stack.enter_context, broker.running(folder, port=port))
        except broker.BrokerError as error:
            missing(f"no Kafka broker: {error}")
        try:
            yield address
        finally:
            await asyncio.to_thread(stack.close)


async def test_no_broker_is_unavailable_and_says_where() -> None:
    """Opening a bus where nobody listens fails within its time limit with an error that has the address."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"no Kafka broker answers at {address}"):
            async with KafkaBus(address):
                pass


async def test_a_cluster_id_may_begin_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One random id in 64 does, and its storage is formatted as any other's."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(bytes=b"\xf8" * 16))
    async with running(tmp_path):
        assert "cluster.id=-Pj4" in (tmp_path / "data/meta.properties").read_text()


async def test_a_silent_broker_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that accepts connections and says nothing is given up after the time limit."""
    monkeypatch.setattr("holdfast.kafka.clients.START_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unavailable, match=address):
            async with KafkaBus(address):
                pass


@pytest.mark.parametrize("bootstrap", ["", "localhost", "localhost:", ":9092", "a:1,b", "a:kafka", "a:65536", "a:0"])
async def test_a_wrong_address_is_refused(bootstrap: str) -> None:
    """Bootstrap servers that are not host:port,host:port are a ConfigurationError that shows them."""
    with pytest.raises(ConfigurationError, match=f"not '{bootstrap}'"):
        async with KafkaBus(bootstrap):
            pass


@pytest.mark.kafka
async def test_namespaces_share_a_cluster(kafka: str) -> None:
    """Two meshes with namespaces of their own have topics and groups of their own."""
    one, two = (f"test-{uuid.uuid4().hex[:12]}" for _ in range(2))
    async with KafkaBus(kafka, namespace=one) as first, KafkaBus(kafka, namespace=two) as second:
        await first.create_topics([LINE])
        with pytest.raises(ConfigurationError):
            await second.publish(PLACE, b"")
        await second.create_topics([LINE])
        await first.publish(PLACE, b"first")
        assert (await second.lag("g", [LINE]))[PLACE].end == 0


@pytest.mark.kafka
@pytest.mark.timeout(300)
async def test_a_broker_may_go_and_come_back(tmp_path: Path) -> None:
    """While a broker is away sends are Unavailable within their time limit and reads wait; when it is back, all goes on
    through the same objects: acked records, positions and the order are there, and nothing is there twice."""
    async with AsyncExitStack() as stack:
        async with running(tmp_path) as address:
            bus = await stack.enter_async_context(KafkaBus(address, send_timeout=1.0, heartbeat=0.2))
            await bus.create_topics([LINE])
            await bus.publish(PLACE, b"acked")
            reader = await stack.enter_async_context(bus.reader({PLACE: 0}))
            member = await stack.enter_async_context(bus.join("g", [LINE]))
            while not await member.read(max_records=1):
                pass
            await member.commit({PLACE: Position(1, "kept")})
            assert [record.value for record in await reader.read()] == [b"acked"]

        began = time.monotonic()
        with pytest.raises(Unavailable, match="may have the record"):
            await bus.publish(PLACE, b"unknown")
        assert time.monotonic() - began < 3
        assert await reader.read(timeout=0.2) == []

        async with running(tmp_path, port=int(address.rpartition(":")[2])):
            async with asyncio.timeout(60):
                while True:
                    try:
                        await bus.publish(PLACE, b"back")
                        break
                    except Unavailable:
                        pass
                values = [record.value for record in await reader.read()]
                while b"back" not in values:
                    values += [record.value for record in await reader.read()]
                assert values.index(b"back") > values.index(b"unknown")
                assert values.count(b"unknown") == 1
                taken = []
                while not taken or taken[-1].value != b"back":
                    taken += await member.read(max_records=10)
                assert (await member.committed())[PLACE] == Position(1, "kept")
            await bus.publish(PLACE, b"last")

        # Closing gives up what cannot be sent.
        unsent = await bus.send(PLACE, b"unsent")
        began = time.monotonic()
        await stack.aclose()
        assert time.monotonic() - began < 30
        with pytest.raises(Unavailable):
            await unsent


@pytest.mark.kafka
async def test_a_member_leaves_to_the_end_though_it_is_cancelled_on_its_way_out(kafka: str) -> None:
    """Its partitions are free at once, and not only when its session has run out."""
    async with KafkaBus(kafka, namespace=f"test-{uuid.uuid4().hex[:12]}", session_timeout=30) as bus:
        await bus.create_topics([LINE])
        leaving = asyncio.Event()

        async def leave() -> None:
            async with bus.join("g", [LINE]) as member:
                while not member.ownership.partitions:
                    await member.read(max_records=0, timeout=1)
                leaving.set()

        task = asyncio.ensure_future(leave())
        await leaving.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(15), bus.join("g", [LINE]) as member:
            while not member.ownership.partitions:
                await member.read(max_records=0, timeout=1)


@pytest.mark.kafka
async def test_a_reader_cancelled_at_its_first_question_leaves_no_connection_open(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is left at once asks for a reader that nobody wants any more."""
    connections: list[AIOKafkaConnection] = []
    asked = asyncio.Event()
    send = AIOKafkaConnection.send

    def noting(connection: AIOKafkaConnection, request: object, **options: bool) -> object:
        connections.append(connection)
        if isinstance(request, MetadataRequest):
            asked.set()
        return send(connection, request, **options)

    async with KafkaBus(kafka, namespace=f"test-{uuid.uuid4().hex[:12]}") as bus:
        await bus.create_topics([LINE])
        await bus.kept(PLACE)
        monkeypatch.setattr(AIOKafkaConnection, "send", noting)
        task = asyncio.ensure_future(bus.reader({PLACE: 0}).__aenter__())
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert connections
        assert not [connection for connection in connections if connection.connected()]


def test_a_connection_that_has_just_broken_says_so_on_uvloop_too() -> None:
    """There writing to it is a RuntimeError, of which a consumer of aiokafka dies, and with it its engine."""

    async def write_to_a_broken_one() -> None:
        async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            connection = Connection(host, port)
            connection._reader, connection._writer = await asyncio.open_connection(host, port)
            connection._read_task = asyncio.create_task(asyncio.sleep(0))
            connection._writer.transport.abort()
            while "closed=True" not in str(connection._writer.transport):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)
            with pytest.raises(KafkaConnectionError, match="broken"):
                connection.send(ApiVersionRequest())
            assert not connection.connected()

    uvloop.run(write_to_a_broken_one())


async def test_a_broker_that_is_away_is_not_asked_for_metadata_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiokafka's producers and consumers ask as fast as they can while a partition has no leader."""
    monkeypatch.setattr(clients, "METADATA_SECONDS", 0.05)
    times: list[float] = []

    async def away(*_where: object) -> bool:
        times.append(time.monotonic())
        return False

    monkeypatch.setattr(AIOKafkaClient, "_metadata_update", away)
    client = Client(bootstrap_servers="127.0.0.1:1")
    for _ in range(4):
        assert not await client._metadata_update(client.cluster, set())
    assert len(times) == 4
    assert all(later - earlier >= 0.05 for earlier, later in pairwise(times))


async def test_every_client_of_a_bus_is_mended(kafka: str) -> None:
    """They are made by aiokafka, deep inside."""
    async with KafkaBus(kafka) as bus:
        await bus.create_topics([LINE])
        await bus.publish(PLACE, b"")
        async with bus.reader({PLACE: 0}) as reader:
            used = [
                bus._admin._client,
                bus._offsets._client,
                bus._interactive._producer.client,
                reader._consumer._client,
            ]
            assert all(isinstance(client, Client) for client in used)
            assert all(isinstance(each, Connection) for client in used for each in client._conns.values())


async def test_a_member_waits_for_a_log_that_does_not_say_where_its_group_stands(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that falls silent just after a rebalance would otherwise end every engine that met the rebalance."""
    committed, failures = KafkaBus.committed, ["once", "again"]

    async def at_last(
        bus: KafkaBus, group: str, partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, Position]:
        if failures:
            raise Unavailable(failures.pop())
        return await committed(bus, group, partitions)

    monkeypatch.setattr(KafkaBus, "committed", at_last)
    monkeypatch.setattr(member, "RETRY_SECONDS", 0.01)
    async with KafkaBus(kafka, namespace=f"test-{uuid.uuid4().hex[:12]}") as bus:
        await bus.create_topics([LINE])
        await bus.publish(PLACE, b"first")
        async with bus.join("group", [LINE]) as joined:
            while not (records := await joined.read(max_records=1)):
                pass
    assert [record.value for record in records] == [b"first"]
    assert not failures
