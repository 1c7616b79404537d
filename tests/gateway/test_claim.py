"""Reply partitions have one owner each, as far as gateways know."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from holdfast.bus import Bus, Member, TopicPartition
from holdfast.client import Client
from holdfast.errors import ConfigurationError, NotAccepted, Unavailable
from holdfast.gateways import Patience
from holdfast.kafka import KafkaBus
from holdfast.memory import MemoryBus
from holdfast.topics import TOKENS, TOPICS, Topic, gateways_of
from services.gateway.claim import Claim, Claims
from tests.conftest import OpenBus
from tests.flow.mesh import ANYWHERE, process
from tests.gateway.doubles import LENGTH, ByteTokenizer, Face, open_face, playing_engine, tokenizing

HOST = "a-host"
PATIENCE = 60.0
"""Seconds that anything may take which is waited for."""


@asynccontextmanager
async def claimed(
    bus: Bus, named: int | None = None, *, host: str = HOST, seconds: float = PATIENCE
) -> AsyncIterator[Claim]:
    """A claim, kept while the block runs as a gateway keeps it."""
    async with Claims(bus, named=named, seconds=seconds, host=host).claimed() as claim:
        keeping = asyncio.create_task(_keep(claim))
        try:
            yield claim
        finally:
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping


async def _keep(claim: Claim) -> None:
    while True:
        await claim.change()


async def test_each_gateway_takes_one_that_is_free(open_bus: OpenBus) -> None:
    """Also those that start at once on one host; and one that starts again finds its own."""
    async with AsyncExitStack() as parts:
        buses = [await parts.enter_async_context(open_bus()) for _ in range(4)]
        await buses[0].create_topics(TOPICS)
        async with claimed(buses[0]) as first:
            own = first.partition
        claims: list[Claim] = []

        async def take(bus: Bus) -> None:
            claims.append(await parts.enter_async_context(claimed(bus)))

        await take(buses[0])
        assert claims[0].partition == own
        await take(buses[1])
        await take(buses[2])
        assert len({claim.partition for claim in claims}) == 3
        assert all(claim.holds for claim in claims)
        assert {claim.partition for claim in claims} == {(own + index) % TOKENS.num_partitions for index in range(3)}


async def test_of_two_that_race_one_goes_on_to_the_next(open_bus: OpenBus) -> None:
    """Both look at the same partitions in the same order, and at the same time."""
    async with AsyncExitStack() as parts:
        buses = [await parts.enter_async_context(open_bus()) for _ in range(2)]
        await buses[0].create_topics(TOPICS)
        done, found = asyncio.Event(), asyncio.Queue[Claim]()

        async def live(bus: Bus) -> None:
            async with claimed(bus) as claim:
                await found.put(claim)
                await done.wait()

        async with asyncio.TaskGroup() as group:
            for bus in buses:
                group.create_task(live(bus))
            one, other = await found.get(), await found.get()
            assert one.partition != other.partition
            done.set()


async def test_what_another_gateway_has_is_refused_by_name(open_bus: OpenBus) -> None:
    """After a while; and given at once when the other leaves."""
    async with AsyncExitStack() as parts:
        first, second = [await parts.enter_async_context(open_bus()) for _ in range(2)]
        await first.create_topics(TOPICS)
        async with AsyncExitStack() as life:
            await life.enter_async_context(claimed(first, 7))
            with pytest.raises(ConfigurationError, match="reply_partition is 7, which another gateway has"):
                async with claimed(second, 7, seconds=0.1):
                    pass
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(enter_and_leave(second))
                await joined_by(first, 2)
                assert not waiting.done()
                await life.aclose()


async def enter_and_leave(bus: Bus) -> None:
    async with claimed(bus, 7) as claim:
        assert claim.holds


async def joined_by(bus: Bus, num_members: int) -> None:
    """Returns when the group of partition 7 has so many members."""
    while len(await bus.group_members(gateways_of(7))) != num_members:  # noqa: ASYNC110 - a group tells nobody
        await asyncio.sleep(0)


async def test_where_all_are_taken_there_is_none() -> None:
    """Which the error says."""
    async with MemoryBus() as bus, AsyncExitStack() as parts:
        await bus.create_topics(TOPICS)
        for _ in range(TOKENS.num_partitions):
            await parts.enter_async_context(claimed(bus))
        with pytest.raises(ConfigurationError, match="have all 32 reply partitions"):
            await parts.enter_async_context(claimed(bus))


@asynccontextmanager
async def gateway(bus: MemoryBus, reply_partition: int | None) -> AsyncIterator[Face]:
    async with (
        tokenizing(ByteTokenizer()) as tokenizer,
        open_face(bus, tokenizer.address, reply_partition=reply_partition, claim_seconds=0.05) as face,
    ):
        yield face


async def missing(face: Face) -> dict[str, str]:
    found: dict[str, str] = (await face.http.get("/readyz")).json()["missing"]
    return found


@pytest.mark.parametrize("named", [7, None])
async def test_a_gateway_that_froze_takes_no_new_requests_until_it_has_a_partition_again(named: int | None) -> None:
    """Its streams go on. The one that was named it gets when the other gateway leaves; otherwise it takes another."""
    async with (
        MemoryBus() as bus,
        playing_engine(bus) as engine,
        gateway(bus, named) as face,
        AsyncExitStack() as parts,
    ):
        answer = face.client.generate("hi")
        await anext(answer)
        job = await engine.job()
        own = job.request.reply_partition
        (member,) = bus.members(gateways_of(own))
        with bus.frozen(member):
            await parts.enter_async_context(claimed(bus, own))
        if named is not None:
            while "reply partition" not in (reasons := await missing(face)):
                pass
            assert f"number {own}" in reasons["reply partition"] or f"is {own}" in reasons["reply partition"]
            async with Client(face.addresses.grpc, patience=Patience(tries=0)) as client:
                with pytest.raises(NotAccepted, match="reply partition is missing"):
                    await client.submit("hi", request_id="given")
        await engine.say(job, "text", finish=LENGTH)
        assert "".join([event.text async for event in answer if hasattr(event, "text")]) == "text"
        if named is not None:
            await parts.aclose()
        else:
            while bus.members(gateways_of((own + 1) % TOKENS.num_partitions)) == []:
                await missing(face)
        while await missing(face):
            pass
        reading = asyncio.ensure_future(face.client.generate("ho").read())
        job = await engine.job()
        assert job.request.reply_partition == (own if named is not None else (own + 1) % TOKENS.num_partitions)
        await engine.say(job, "more", finish=LENGTH)
        assert await reading == "more"


async def test_a_claim_that_is_lost_is_missed_at_once() -> None:
    """Not only when the group has heard that its member leaves: what comes meanwhile is refused, and told why."""
    leaving, may_leave = asyncio.Event(), asyncio.Event()

    class Slow(MemoryBus):
        @asynccontextmanager
        async def join(self, group: str, topics: Sequence[Topic], *, incarnation: int = 0) -> AsyncIterator[Member]:
            async with super().join(group, topics, incarnation=incarnation) as member:
                yield member
                if group == gateways_of(7):
                    leaving.set()
                    await may_leave.wait()

    async with Slow() as bus, playing_engine(bus), gateway(bus, 7) as face, AsyncExitStack() as parts:
        (member,) = bus.members(gateways_of(7))
        with bus.frozen(member):
            await parts.enter_async_context(claimed(bus, 7))
        await leaving.wait()
        assert (await missing(face)) == {"reply partition": "another gateway has taken number 7"}
        async with Client(face.addresses.grpc, patience=Patience(tries=0)) as client:
            with pytest.raises(NotAccepted, match="reply partition is missing: another gateway"):
                await client.submit("hi", request_id="given")
        may_leave.set()


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_a_process_that_froze_finds_out_on_a_broker_too(kafka: str) -> None:
    """The group has thrown it out meanwhile; awake it says that it is not ready, until it has its partition again."""
    log = {"kafka": kafka, "kafka_namespace": f"test-{uuid.uuid4().hex[:12]}"}
    async with (
        tokenizing(ByteTokenizer()) as tokenizer,
        process(
            "gateway", reply_partition=7, address=ANYWHERE, http_address=ANYWHERE, tokenizer=tokenizer.address, **log
        ) as one,
        KafkaBus(log["kafka"], namespace=log["kafka_namespace"]) as bus,
        httpx.AsyncClient() as http,
    ):
        ready = f"http://{(await one.addresses())['http']}/readyz"
        one.freeze()
        async with claimed(bus, 7):
            one.wake()
            while "reply partition" not in (await http.get(ready)).json()["missing"]:
                pass
        while "reply partition" in (await http.get(ready)).json()["missing"]:
            pass


async def test_a_gateway_whose_log_cannot_be_asked_yet_asks_again() -> None:
    """As that of a broker which has just started."""

    class Starting(MemoryBus):
        async def group_members(self, group: str) -> dict[str, frozenset[TopicPartition]]:
            if group.startswith("holdfast-gateway") and not refusals:
                refusals.append(group)
                raise Unavailable("there is no coordinator yet", retry_after=0.01)
            return await super().group_members(group)

    refusals: list[str] = []
    async with Starting() as bus, playing_engine(bus), gateway(bus, None) as face:
        assert await missing(face) == {}
    assert len(refusals) == 1


async def test_a_gateway_does_not_start_on_the_partition_of_another() -> None:
    """It names the setting."""
    async with MemoryBus() as bus, playing_engine(bus), gateway(bus, 7):
        with pytest.raises(ConfigurationError, match="reply_partition is 7"):
            async with gateway(bus, 7):
                pass
