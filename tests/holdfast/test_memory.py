"""What is true of the log in memory alone: its bound, and how it shares partitions."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.bus import MAX_RECORD_BYTES, Position, TopicPartition
from holdfast.errors import ConfigurationError, Unavailable
from holdfast.memory import MemoryBus, assign
from holdfast.topics import Topic

PAIR = Topic("pair", 2, timedelta(hours=1))


async def test_a_topic_forgets_its_oldest_records() -> None:
    """Beyond max_topic_bytes the oldest records of the topic are dropped, whatever partition they lie in."""
    async with MemoryBus(max_topic_bytes=3 * MAX_RECORD_BYTES) as bus:
        await bus.create_topics([PAIR])
        await bus.publish(PAIR.partition(0), b"oldest")
        for number in range(4):
            await bus.publish(PAIR.partition(1), b"%d" % number + bytes(900_000))
        assert await bus.kept(PAIR.partition(0)) == range(1, 1)
        assert await bus.kept(PAIR.partition(1)) == range(1, 4)
        async with bus.reader({PAIR.partition(1): 1}) as reader:
            assert [record.value[:1] for record in await reader.read()] == [b"1", b"2", b"3"]
        async with bus.reader({PAIR.partition(0): 0}) as reader:
            with pytest.raises(Unavailable, match=r"pair\[0\] does not hold offset 0: it was dropped"):
                await reader.read()


async def test_a_reader_learns_that_it_was_too_slow() -> None:
    """A reader whose next record was dropped gets Unavailable, not the record after it."""
    async with MemoryBus(max_topic_bytes=2 * MAX_RECORD_BYTES) as bus:
        await bus.create_topics([PAIR])
        async with bus.reader({PAIR.partition(0): 0}) as reader:
            for _ in range(3):
                await bus.publish(PAIR.partition(0), bytes(900_000))
            with pytest.raises(Unavailable, match="offset 0"):
                await reader.read()


async def test_a_group_goes_on_with_what_is_kept() -> None:
    """A member that was to read dropped records reads on from the oldest that is left, as on a broker."""
    async with MemoryBus(max_topic_bytes=2 * MAX_RECORD_BYTES) as bus:
        await bus.create_topics([PAIR])
        async with bus.join("g", [PAIR]) as member:
            await member.read(max_records=1)
            await member.commit({PAIR.partition(0): Position(0)})
            for _ in range(3):
                await bus.publish(PAIR.partition(0), bytes(900_000))
            assert [record.offset for record in await member.read(max_records=5)] == [1, 2]


async def test_a_bound_below_one_record_is_refused() -> None:
    """A topic that could not keep a single record is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="1,000,000 bytes"):
        MemoryBus(max_topic_bytes=999_999)


async def test_members_of_a_group_name_the_same_topics() -> None:
    """Joining a group for other topics than its members did is a ConfigurationError, and changes nothing for them."""
    async with MemoryBus() as bus:
        await bus.create_topics([PAIR, Topic("other", 1, PAIR.retention)])
        async with bus.join("g", [PAIR]) as member:
            before = member.ownership
            with pytest.raises(ConfigurationError, match="same topics"):
                async with bus.join("g", [PAIR, Topic("other", 1, PAIR.retention)]):
                    pass
            assert member.ownership is before


async def test_closing_the_bus_wakes_who_reads() -> None:
    """A read that waits when the bus is closed ends with Unavailable."""
    bus = MemoryBus()
    async with bus:
        await bus.create_topics([PAIR])
        reader = bus.reader({PAIR.partition(0): None})
        waiting = asyncio.ensure_future((await reader.__aenter__()).read())
        await asyncio.wait([waiting], timeout=0.01)
    with pytest.raises(Unavailable, match="closed"):
        await waiting
    await reader.__aexit__(None, None, None)


async def test_a_frozen_member_takes_nothing_until_it_thaws() -> None:
    """While a member is frozen its read finds nothing, it owns in its own eyes what it owned, and others go on."""
    async with MemoryBus() as bus:
        await bus.create_topics([PAIR])
        async with bus.join("g", [PAIR]) as zombie, bus.join("g", [PAIR]) as lives:
            await zombie.read(max_records=0)
            believed = zombie.ownership
            with bus.frozen(bus.members("g")[0]):
                await bus.publish(PAIR.partition(0), b"a")
                assert await zombie.read(max_records=1, timeout=0.01) == []
                assert zombie.ownership is believed
                assert lives.ownership.partitions == set(PAIR.partitions)
            assert await zombie.read(max_records=1) == []
            assert not zombie.ownership.continues(believed)


PARTITIONS = [TopicPartition("t", index) for index in range(12)]


@given(data=st.data(), num_members=st.integers(1, 15), num_partitions=st.integers(0, 12))
def test_assignment_is_a_fair_partition(data: st.DataObject, num_members: int, num_partitions: int) -> None:
    """Whatever members owned before, every partition gets one owner, and shares differ by one at most."""
    partitions = PARTITIONS[:num_partitions]
    owners = [data.draw(st.one_of(st.none(), st.integers(0, num_members - 1))) for _ in partitions]
    owned = [
        {p for p, owner in zip(partitions, owners, strict=True) if owner == member} for member in range(num_members)
    ]
    shares = assign(partitions, owned)
    assert sorted(p for share in shares for p in share) == partitions
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(data=st.data(), num_members=st.integers(1, 6))
def test_assignment_moves_no_more_than_it_must(data: st.DataObject, num_members: int) -> None:
    """A member loses partitions only down to a fair share, so a second assignment changes nothing."""
    owners = [data.draw(st.integers(0, num_members - 1)) for _ in PARTITIONS]
    owned = [
        {p for p, owner in zip(PARTITIONS, owners, strict=True) if owner == member} for member in range(num_members)
    ]
    shares = assign(PARTITIONS, owned)
    fair = len(PARTITIONS) // num_members
    for before, after in zip(owned, shares, strict=True):
        assert len(after & before) >= min(len(before), fair)
    assert assign(PARTITIONS, shares) == shares
