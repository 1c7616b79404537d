"""What a bus promises, held against both of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.protocol.group import LeaveGroupRequest

from holdfast.bus import (
    MAX_METADATA_BYTES,
    MAX_RECORD_BYTES,
    Bus,
    Lag,
    Member,
    Position,
    Record,
    TopicPartition,
)
from holdfast.errors import ConfigurationError, InvalidRequest, NotOwner, Unavailable
from holdfast.kafka import KafkaBus
from holdfast.memory import MemoryBus, MemoryMember
from holdfast.topics import Topic
from tests.conftest import OpenBus

LETTERS = Topic("letters", 4, timedelta(hours=1))
LINE = Topic("line", 1, timedelta(hours=1))
PLACE = LINE.partition(0)

SOON = 20.0
"""Seconds within which what must happen has happened."""

MOMENT = 0.2
"""Seconds given to what must not happen."""


@pytest.fixture(autouse=True)
async def topics(bus: Bus) -> None:
    await bus.create_topics([LETTERS, LINE])


async def publish_all(bus: Bus, *values: bytes, topic: Topic = LINE) -> list[int]:
    """Sends the values, in turn to the partitions of the topic, and returns their offsets once all are acked."""
    acks = [await bus.send(topic.partition(i % topic.num_partitions), value) for i, value in enumerate(values)]
    return [await ack for ack in acks]


def owned(*members: Member) -> dict[str, frozenset[TopicPartition]]:
    """As these members know it themselves."""
    return {member.ownership.member_id: member.ownership.partitions for member in members}


async def settle(*members: Member, num_partitions: int = LETTERS.num_partitions) -> None:
    """Reads, but takes nothing, until these members and nobody else own all partitions in one generation."""

    def settled() -> bool:
        generations = {member.ownership.generation for member in members}
        return len(generations) == 1 and sum(len(m.ownership.partitions) for m in members) == num_partitions

    async with asyncio.timeout(SOON):
        while not settled():
            await asyncio.gather(*(member.read(max_records=0, timeout=MOMENT) for member in members))
        for member in members:
            await member.read(max_records=0, timeout=0)


async def take(member: Member, number: int) -> list[Record]:
    """So many records."""
    records: list[Record] = []
    async with asyncio.timeout(SOON):
        while len(records) < number:
            records += await member.read(max_records=number - len(records))
    return records


def values(records: list[Record]) -> list[bytes]:
    return [record.value for record in records]


@asynccontextmanager
async def thrown_out(bus: Bus, group: str, member: Member) -> AsyncIterator[None]:
    """Has the group throw the member out, as if it had given no sign of life for too long. It may come back at once,
    but not before the block is left if the bus is the one in memory."""
    if isinstance(bus, MemoryBus):
        assert isinstance(member, MemoryMember)
        with bus.frozen(member):
            yield
        return
    assert isinstance(bus, KafkaBus)
    name = bus._names.prefix + group
    client = AIOKafkaClient(bootstrap_servers=bus._bootstrap)
    await client.bootstrap()
    try:
        coordinator = await client.coordinator_lookup(CoordinationType.GROUP, name)
        answer = await client.send(coordinator, LeaveGroupRequest(name, member.ownership.member_id))
        assert answer.error_code == 0
        yield
    finally:
        await client.close()


class TestSending:
    async def test_records_lie_in_the_order_of_the_sends(self, bus: Bus) -> None:
        """What one bus sends to a partition is read in the order of the calls, at the offsets that the acks named."""
        numbers = [b"%d" % i for i in range(500)]
        offsets = await publish_all(bus, *numbers)
        async with bus.reader({PLACE: 0}) as reader:
            records: list[Record] = []
            while len(records) < len(numbers):
                records += await reader.read(timeout=SOON)
        assert values(records) == numbers
        assert [record.offset for record in records] == offsets == sorted(offsets)

    async def test_waiting_sends_are_not_overtaken(self, bus: Bus) -> None:
        """Sends that wait for a full buffer keep their place: small ones after a large one come after it."""
        sizes = [900_000, 10, 900_000, 900_000, 10, 10, 900_000, 10]
        sends = [bus.publish(PLACE, bytes(size)) for size in sizes]
        offsets = await asyncio.gather(*sends)
        assert offsets == sorted(offsets)

    async def test_a_record_keeps_what_it_was_sent_with(self, bus: Bus) -> None:
        """Key, headers in their order, value, place and the time of the append are what a reader gets."""
        before = time.time_ns() // 1_000_000
        headers = (("traceparent", b"00-1"), ("a", b""), ("traceparent", b"\xff"))
        offset = await bus.publish(LETTERS.partition(2), b"value", key=b"key", headers=headers)
        bare = await bus.publish(LETTERS.partition(2), b"")
        after = time.time_ns() // 1_000_000
        async with bus.reader({LETTERS.partition(2): 0}) as reader:
            first, second = await reader.read(timeout=SOON)
        assert before <= first.timestamp_ms <= second.timestamp_ms <= after
        assert first == Record("letters", 2, offset, first.timestamp_ms, b"value", b"key", headers)
        assert second == Record("letters", 2, bare, second.timestamp_ms, b"", None, ())

    async def test_nothing_is_lost_after_an_ack(self, bus: Bus, open_bus: OpenBus) -> None:
        """What one connection published, another reads, though the first one is gone."""
        async with open_bus() as other:
            await other.publish(PLACE, b"kept")
        async with bus.reader({PLACE: 0}) as reader:
            assert values(await reader.read(timeout=SOON)) == [b"kept"]

    async def test_the_largest_record_passes_and_a_larger_one_is_refused(self, bus: Bus) -> None:
        """A record of MAX_RECORD_BYTES, key and headers included, is taken; one more byte is InvalidRequest."""
        largest = bytes(MAX_RECORD_BYTES - 6)
        offset = await bus.publish(PLACE, largest, key=b"key", headers=(("h", b"12"),))
        with pytest.raises(InvalidRequest, match="1,000,001 bytes"):
            await bus.send(PLACE, largest + b"!", key=b"key", headers=(("h", b"12"),))
        async with bus.reader({PLACE: offset}) as reader:
            assert values(await reader.read(timeout=SOON)) == [largest]

    async def test_a_cancelled_ack_does_not_disturb_others(self, bus: Bus) -> None:
        """Whoever stops waiting for an ack leaves the record and the acks after it alone."""
        first = await bus.send(PLACE, b"1")
        second = await bus.send(PLACE, b"2")
        first.cancel()
        async with bus.reader({PLACE: 0}) as reader, asyncio.timeout(SOON):
            records: list[Record] = []
            while len(records) < 2:
                records += await reader.read()
        assert values(records) == [b"1", b"2"]
        assert records[1].offset == await second


class TestTopics:
    async def test_creating_what_exists_changes_nothing(self, bus: Bus) -> None:
        """create_topics may be called by every service at its start."""
        await bus.publish(PLACE, b"kept")
        await bus.create_topics([LETTERS, LINE])
        assert (await bus.lag("g", [LINE]))[PLACE].end == 1

    async def test_another_number_of_partitions_is_refused(self, bus: Bus) -> None:
        """A topic that exists with another number of partitions than asked is a ConfigurationError that says both."""
        with pytest.raises(ConfigurationError, match="line exists with 1 partitions, not 2"):
            await bus.create_topics([replace(LINE, num_partitions=2)])

    @pytest.mark.parametrize("place", [TopicPartition("line", 1), TopicPartition("nothing", 0)])
    async def test_what_does_not_exist_is_refused(self, bus: Bus, place: TopicPartition) -> None:
        """A partition or topic that the log does not have is a ConfigurationError at once, and is not created."""
        unknown = Topic(place.topic, place.partition + 1, timedelta(hours=1))
        named = rf"no partition {place.partition} of a topic (\S+\.)?{place.topic}$"
        with pytest.raises(ConfigurationError, match=named):
            await bus.send(place, b"")
        with pytest.raises(ConfigurationError, match=place.topic):
            async with bus.reader({place: None}):
                pass
        with pytest.raises(ConfigurationError, match=place.topic):
            await bus.kept(place)
        with pytest.raises(ConfigurationError, match=place.topic):
            async with bus.join("g", [unknown]):
                pass
        with pytest.raises(ConfigurationError, match=place.topic):
            await bus.lag("g", [unknown])


class TestReader:
    async def test_it_reads_from_an_offset(self, bus: Bus) -> None:
        """A reader begins at the offset it was given, and its position is the next one it wants."""
        offsets = await publish_all(bus, b"a", b"b", b"c")
        async with bus.reader({PLACE: offsets[1]}) as reader:
            assert reader.position(PLACE) == offsets[1]
            assert values(await reader.read(timeout=SOON)) == [b"b", b"c"]
            assert offsets[2] < reader.position(PLACE) <= (await bus.lag("g", [LINE]))[PLACE].end

    async def test_from_the_end_it_reads_what_comes_after_it_was_opened(self, bus: Bus) -> None:
        """A reader from None sees nothing older than itself, and everything published after it was entered."""
        await publish_all(bus, b"old")
        async with bus.reader({PLACE: None}) as reader:
            end = reader.position(PLACE)
            assert await bus.publish(PLACE, b"new") == end
            assert values(await reader.read(timeout=SOON)) == [b"new"]

    async def test_a_waiting_read_returns_with_the_first_record(self, bus: Bus) -> None:
        """A read without a timeout waits for a record and returns with it."""
        async with bus.reader({PLACE: None}) as reader, asyncio.TaskGroup() as tasks, asyncio.timeout(SOON):
            waiting = tasks.create_task(reader.read())
            await bus.publish(PLACE, b"came")
            assert values(await waiting) == [b"came"]

    async def test_a_timeout_returns_nothing(self, bus: Bus) -> None:
        """A read that finds nothing within its timeout returns [], and loses nothing that comes later."""
        async with bus.reader({PLACE: 0}) as reader:
            assert await reader.read(timeout=0) == []
            assert await reader.read(timeout=MOMENT) == []
            await bus.publish(PLACE, b"late")
            assert values(await reader.read(timeout=SOON)) == [b"late"]

    async def test_a_cancelled_read_takes_nothing(self, bus: Bus) -> None:
        """Records that come while a read is being cancelled are there for the next one."""
        async with bus.reader({PLACE: 0}) as reader:
            for number in range(20):
                reading = asyncio.ensure_future(reader.read())
                await bus.publish(PLACE, b"%d" % number)
                reading.cancel()
                records = [] if await asyncio.wait([reading]) and reading.cancelled() else reading.result()
                assert values(records or await reader.read(timeout=SOON)) == [b"%d" % number]

    async def test_it_takes_no_more_than_asked(self, bus: Bus) -> None:
        """max_records bounds a read; the rest is there for the next one."""
        numbers = [b"%d" % i for i in range(5)]
        await publish_all(bus, *numbers)
        async with bus.reader({PLACE: 0}) as reader:
            batches = [await reader.read(max_records=2, timeout=SOON) for _ in range(3)]
        assert [values(batch) for batch in batches] == [numbers[:2], numbers[2:4], numbers[4:]]

    async def test_partitions_are_read_together_and_each_in_its_order(self, bus: Bus) -> None:
        """One reader of several partitions, from different offsets, gets all of each in order."""
        await publish_all(bus, *(b"%d" % i for i in range(40)), topic=LETTERS)
        start = {LETTERS.partition(0): 0, LETTERS.partition(1): 3, LETTERS.partition(3): None}
        async with bus.reader(start) as reader, asyncio.timeout(SOON):
            await bus.publish(LETTERS.partition(3), b"end")
            records: list[Record] = []
            while len(records) < 10 + 7 + 1:
                records += await reader.read(max_records=4)
        read = {p: [r.value for r in records if r.topic_partition == p] for p in start}
        assert read[LETTERS.partition(0)] == [b"%d" % i for i in range(0, 40, 4)]
        assert read[LETTERS.partition(1)] == [b"%d" % i for i in range(13, 40, 4)]
        assert read[LETTERS.partition(3)] == [b"end"]

    async def test_what_is_kept_can_be_read(self, bus: Bus) -> None:
        """The range begins with the oldest record, and ends where the next one will lie."""
        assert not await bus.kept(PLACE)
        offsets = await publish_all(bus, b"a", b"b", b"c")
        kept = await bus.kept(PLACE)
        assert (kept.start, kept.stop > offsets[2]) == (offsets[0], True)
        async with bus.reader({PLACE: kept[-2:].start}) as reader:
            assert values(await reader.read(timeout=SOON))[-1] == b"c"
        async with bus.reader({PLACE: kept.stop}) as reader:
            assert await bus.publish(PLACE, b"d") == kept.stop
            assert values(await reader.read(timeout=SOON)) == [b"d"]

    async def test_an_offset_that_the_log_does_not_hold_is_unavailable(self, bus: Bus) -> None:
        """A reader never jumps silently: an offset beyond the end is Unavailable, and names the place."""
        async with bus.reader({PLACE: 7}) as reader:
            with pytest.raises(Unavailable, match=r"line.*7"):
                await reader.read(timeout=SOON)


class TestGroups:
    async def test_a_lone_member_owns_all_and_reads_from_the_beginning(self, bus: Bus) -> None:
        """The first member of a group gets every partition, and what was there before the group."""
        await publish_all(bus, *(b"%d" % i for i in range(8)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as member:
            assert values(sorted(await take(member, 8), key=lambda r: int(r.value))) == [b"%d" % i for i in range(8)]
            assert member.ownership.partitions == set(LETTERS.partitions)

    async def test_a_member_may_read_several_topics(self, bus: Bus) -> None:
        """Joining for two topics shares the partitions of both."""
        await bus.publish(LETTERS.partition(1), b"letter")
        await bus.publish(PLACE, b"line")
        async with bus.join("g", [LETTERS, LINE]) as member:
            assert set(values(await take(member, 2))) == {b"letter", b"line"}
            assert member.ownership.partitions == {*LETTERS.partitions, PLACE}

    async def test_members_share_the_partitions_evenly(self, bus: Bus) -> None:
        """Two members own two of four partitions each, and every record is read by its owner alone."""
        async with bus.join("g", [LETTERS]) as one, bus.join("g", [LETTERS]) as two:
            await settle(one, two)
            assert not one.ownership.partitions & two.ownership.partitions
            assert len(one.ownership.partitions) == len(two.ownership.partitions) == 2
            await publish_all(bus, *(b"%d" % i for i in range(8)), topic=LETTERS)
            for member in (one, two):
                records = await take(member, 4)
                assert {record.topic_partition for record in records} == member.ownership.partitions
                assert await member.read(max_records=1, timeout=MOMENT) == []

    async def test_owners_change_as_little_as_can_be(self, bus: Bus) -> None:
        """Assignment is sticky: who stays keeps partitions it had, when somebody comes and when somebody goes."""
        async with bus.join("g", [LETTERS]) as one:
            await settle(one)
            async with bus.join("g", [LETTERS]) as two:
                await settle(one, two)
                had = one.ownership.partitions
                async with bus.join("g", [LETTERS]) as three:
                    await settle(one, two, three)
                    assert len(one.ownership.partitions & had) == len(one.ownership.partitions)
                await settle(one, two)
                assert one.ownership.partitions == had

    async def test_who_stays_takes_over_what_was_not_committed(self, bus: Bus) -> None:
        """When a member leaves, the other gets its partitions at once, from the committed positions."""
        await publish_all(bus, *(b"%d" % i for i in range(12)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as stays:
            async with bus.join("g", [LETTERS]) as leaves:
                await settle(stays, leaves)
                left = leaves.ownership.partitions
                records = await take(leaves, 6)
                await leaves.commit({p: Position(2) for p in left})
            await settle(stays)
            again = [record for record in await take(stays, 8) if record.topic_partition in left]
        assert {(r.topic_partition, r.offset) for r in again} == {
            (r.topic_partition, r.offset) for r in records if r.offset == 2
        }

    async def test_a_rebalance_sends_back_to_the_committed_position_also_what_stays(self, bus: Bus) -> None:
        """After any rebalance, what a member read and did not commit comes again, from the partitions it kept, too."""
        await publish_all(bus, *(b"%d" % i for i in range(8)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as one:
            await take(one, 8)
            await one.commit({LETTERS.partition(i): Position(1) for i in range(4)})
            async with bus.join("g", [LETTERS]) as two:
                await settle(one, two)
                assert [record.offset for record in await take(one, 2)] == [1, 1]

    async def test_a_change_of_ownership_is_met_before_its_records(self, bus: Bus) -> None:
        """A read during which the ownership changes returns [], and the records of one read belong to what is owned
        when it returns."""
        await publish_all(bus, *(b"%d" % i for i in range(40)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as one:
            async with asyncio.timeout(SOON):
                assert await one.read(max_records=10) == []
                assert one.ownership.partitions == set(LETTERS.partitions)
                seen = one.ownership
                async with bus.join("g", [LETTERS]) as two:
                    records = await one.read(max_records=1, timeout=MOMENT)
                    while one.ownership == seen:
                        records = await one.read(max_records=1, timeout=MOMENT)
                    assert records == []
                    await settle(one, two)
                    assert {r.topic_partition for r in await take(one, 20)} == one.ownership.partitions

    async def test_a_waiting_read_returns_when_the_ownership_changes(self, bus: Bus) -> None:
        """A member that waits for records learns of a rebalance by its read returning [], not by a timeout of its own."""
        async with bus.join("g", [LETTERS]) as one:
            await settle(one)
            async with asyncio.timeout(SOON), asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(one.read(max_records=1))
                async with bus.join("g", [LETTERS]):
                    assert await waiting == []
                    assert len(one.ownership.partitions) == 2

    async def test_a_read_of_no_records_takes_part_in_rebalances(self, bus: Bus) -> None:
        """With max_records=0 a member takes nothing, though there is something, and still learns of a rebalance."""
        await publish_all(bus, *(b"%d" % i for i in range(4)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as full:
            await settle(full)
            assert await full.read(max_records=0, timeout=MOMENT) == []
            async with asyncio.timeout(SOON), asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(full.read(max_records=0))
                async with bus.join("g", [LETTERS]) as free:
                    assert await waiting == []
                    await settle(full, free)
                    assert len(await take(free, 2)) == 2
                    assert len(await take(full, 2)) == 2

    async def test_what_is_not_read_stays_for_others(self, bus: Bus) -> None:
        """Back-pressure: a member that has room for two records leaves the rest to the one that comes."""
        await publish_all(bus, *(b"%d" % i for i in range(10)))
        async with bus.join("g", [LINE]) as small:
            records = await take(small, 2)
            await small.commit({PLACE: Position(2)})
        async with bus.join("g", [LINE]) as large:
            records += await take(large, 8)
        assert values(records) == [b"%d" % i for i in range(10)]

    async def test_groups_do_not_know_of_one_another(self, bus: Bus) -> None:
        """Every group reads all records and has its own positions."""
        await publish_all(bus, b"a")
        async with bus.join("one", [LINE]) as one, bus.join("two", [LINE]) as two:
            assert values(await take(one, 1)) == values(await take(two, 1)) == [b"a"]
            await one.commit({PLACE: Position(1)})
            assert await two.committed() == {}

    async def test_a_group_knows_its_members_and_what_each_owns(self, bus: Bus, open_bus: OpenBus) -> None:
        """To whoever asks, a member or not; a group that nobody joined has none."""
        async with open_bus() as other:
            assert await other.group_members("g") == {}
            async with bus.join("g", [LETTERS]) as one:
                await settle(one)
                assert await other.group_members("g") == owned(one)
                async with bus.join("g", [LETTERS]) as two:
                    await settle(one, two)
                    assert await other.group_members("g") == owned(one, two)
                    assert len(owned(one, two)) == 2
                    assert await other.group_members("another") == {}
                await settle(one)
                assert await other.group_members("g") == owned(one)
            assert await other.group_members("g") == {}

    async def test_connections_share_groups(self, bus: Bus, open_bus: OpenBus) -> None:
        """Members of one group that joined through different connections share its partitions."""
        async with open_bus() as other, bus.join("g", [LETTERS]) as one, other.join("g", [LETTERS]) as two:
            await settle(one, two)
            assert one.ownership.partitions | two.ownership.partitions == set(LETTERS.partitions)


class TestGenerations:
    async def test_each_rebalance_raises_the_generation_by_one(self, bus: Bus) -> None:
        """A member that was there all the time continues from each ownership to the next, and its epoch rises."""
        async with bus.join("g", [LETTERS], incarnation=3) as one:
            await settle(one)
            alone = one.ownership
            async with bus.join("g", [LETTERS]) as two:
                await settle(one, two)
                together = one.ownership
                assert together.continues(alone)
                assert not two.ownership.continues(alone)
            await settle(one)
            assert one.ownership.continues(together)
            assert not one.ownership.continues(alone)
            assert one.ownership.epoch > together.epoch > alone.epoch > 3 << 32

    async def test_a_group_remembers_its_generation(self, bus: Bus) -> None:
        """A group that was left by all goes on with a higher generation, and from its committed positions."""
        await publish_all(bus, b"a", b"b")
        async with bus.join("g", [LINE]) as member:
            await take(member, 2)
            await member.commit({PLACE: Position(1)})
            first = member.ownership
        async with bus.join("g", [LINE]) as member:
            assert values(await take(member, 1)) == [b"b"]
            assert member.ownership.epoch > first.epoch
            assert not member.ownership.continues(first)

    async def test_who_was_thrown_out_does_not_continue(self, bus: Bus) -> None:
        """A member that its group threw out comes back under another id, and so knows that it lost what it had."""
        async with bus.join("g", [LETTERS]) as member:
            await settle(member)
            before = member.ownership
            async with thrown_out(bus, "g", member):
                pass
            async with asyncio.timeout(SOON):
                while member.ownership == before:
                    assert await member.read(max_records=1) == []
            assert member.ownership.member_id != before.member_id
            assert member.ownership.epoch > before.epoch
            assert not member.ownership.continues(before)

    async def test_a_frozen_members_partitions_are_served(self, bus: Bus) -> None:
        """The group goes on without a member that it threw out: what that one had read and not committed comes again."""
        await publish_all(bus, *(b"%d" % i for i in range(4)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as frozen, bus.join("g", [LETTERS]) as lives:
            await settle(frozen, lives)
            lost = frozen.ownership
            await take(frozen, 2)
            async with thrown_out(bus, "g", frozen), asyncio.timeout(SOON):
                while (generation := lives.ownership.generation) == lost.generation:
                    await lives.read(max_records=0)
                assert generation > lost.generation
            await settle(frozen, lives)
            records = await take(frozen, 2) + await take(lives, 2)
            assert len({record.value for record in records}) == 4


class TestCommits:
    async def test_metadata_comes_back(self, bus: Bus) -> None:
        """What is committed with a position, up to MAX_METADATA_BYTES of any text, is there for the next owner."""
        text = "é" * (MAX_METADATA_BYTES // 2)
        async with bus.join("g", [LETTERS]) as one:
            await settle(one)
            assert await one.committed() == {}
            await one.commit({LETTERS.partition(0): Position(5, text), LETTERS.partition(1): Position(0)})
            await one.commit({LETTERS.partition(1): Position(7)})
        async with bus.join("g", [LETTERS]) as two:
            await settle(two)
            assert await two.committed() == {
                LETTERS.partition(0): Position(5, text),
                LETTERS.partition(1): Position(7),
            }

    async def test_too_much_metadata_is_refused(self, bus: Bus) -> None:
        """A byte more than MAX_METADATA_BYTES is a ValueError, and nothing is kept."""
        async with bus.join("g", [LINE]) as member:
            await settle(member, num_partitions=1)
            with pytest.raises(ValueError, match="4000 bytes"):
                await member.commit({PLACE: Position(1, "x" * (MAX_METADATA_BYTES + 1))})
            assert await member.committed() == {}

    async def test_who_lost_a_partition_cannot_commit_it(self, bus: Bus) -> None:
        """A commit that names a partition which a rebalance took away is NotOwner and keeps nothing; one for those
        that stayed is kept."""
        async with bus.join("g", [LETTERS]) as one:
            await settle(one)
            async with bus.join("g", [LETTERS]) as two:
                await settle(one, two)
                with pytest.raises(NotOwner):
                    await one.commit({partition: Position(3) for partition in LETTERS.partitions})
                assert await one.committed() == await two.committed() == {}
                kept = {partition: Position(3) for partition in one.ownership.partitions}
                await one.commit(kept)
                assert await one.committed() == kept

    async def test_a_commit_in_the_middle_of_a_rebalance_decides_by_its_outcome(self, bus: Bus) -> None:
        """Commits that meet a rebalance neither throw the member out nor move a lost partition's position."""
        async with bus.join("g", [LETTERS]) as one:
            await settle(one)
            first = one.ownership
            async with bus.join("g", [LETTERS]) as two:
                async with asyncio.timeout(SOON):
                    while one.ownership is first:
                        await one.commit({LETTERS.partition(0): Position(1)})
                        await asyncio.gather(one.read(max_records=0, timeout=0), two.read(max_records=0, timeout=0.01))
                await settle(one, two)
                assert one.ownership.continues(first)

    async def test_who_was_thrown_out_cannot_commit(self, bus: Bus) -> None:
        """A commit by a member that the group threw out is NotOwner, whether or not the member knows."""
        async with bus.join("g", [LINE]) as member:
            await settle(member, num_partitions=1)
            async with thrown_out(bus, "g", member):
                with pytest.raises(NotOwner):
                    await member.commit({PLACE: Position(1)})
            assert (await bus.lag("g", [LINE]))[PLACE].committed is None

    async def test_lag_is_what_lies_behind_the_end(self, bus: Bus) -> None:
        """lag tells each partition's end and what the group has committed there, also for a group that never was."""
        await publish_all(bus, *(b"%d" % i for i in range(6)), topic=LETTERS)
        async with bus.join("g", [LETTERS]) as member:
            await settle(member)
            await member.commit({LETTERS.partition(1): Position(1, "x")})
        lag = await bus.lag("g", [LETTERS])
        assert [lag[partition] for partition in LETTERS.partitions] == [
            Lag(2, None),
            Lag(2, Position(1, "x")),
            Lag(1, None),
            Lag(1, None),
        ]
        assert (await bus.lag("nobody", [LINE])) == {PLACE: Lag(0, None, start=0)}


async def test_a_closed_bus_is_unavailable(bus: Bus, open_bus: OpenBus) -> None:
    """A connection that was closed sends nothing and is read from no more."""
    if isinstance(bus, MemoryBus):
        closed: Bus = MemoryBus()
        async with closed:
            await closed.create_topics([LINE])
    else:
        async with open_bus() as closed:
            await closed.publish(PLACE, b"a")
    with pytest.raises(Unavailable):
        await closed.publish(PLACE, b"b")
    with pytest.raises(Unavailable):
        await closed.create_topics([LINE])
    with pytest.raises(Unavailable):
        await closed.lag("g", [LINE])
