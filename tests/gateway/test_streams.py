"""What the gateway does with the token topic when it holds what it should not, or cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from holdfast.bus import Reader, Record, TopicPartition
from holdfast.errors import Unavailable
from holdfast.events import Tokens
from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.topics import TOKENS
from tests.gateway.doubles import LENGTH, Mesh, open_mesh


async def counted(mesh: Mesh, name: str) -> float:
    """A counter of the gateway."""
    lines = (await mesh.http.get("/metrics")).text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return float(value)


async def test_a_record_that_is_no_batch_is_counted_and_passed_over() -> None:
    """One unreadable record does not end the streams that come after it."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.bus.publish(TOKENS.partition(0), b"\xff\xff")
        await mesh.engine.say(job, "text", finish=LENGTH)
        assert await answer.read() == "text"
        assert await counted(mesh, "holdfast_gateway_unreadable_records_total") == 1


async def test_records_of_a_former_owner_are_counted() -> None:
    """What is ignored because its epoch is over can be seen from outside."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.write(job, epoch=9)  # an owner's marker
        await mesh.engine.say(job, "zombie", epoch=8)
        job.written.clear()
        await mesh.engine.say(job, "owner", finish=LENGTH, epoch=9)
        assert await answer.read() == "owner"
        assert await counted(mesh, "holdfast_gateway_stale_records_total") == 1


class Failing:
    """A reader that fails when it is told to."""

    def __init__(self, reader: Reader, fail: asyncio.Event) -> None:
        self._reader = reader
        self._fail = fail

    def position(self, partition: TopicPartition) -> int:
        return self._reader.position(partition)

    async def read(self, *, max_records: int = 1024, timeout: float | None = None) -> list[Record]:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._reader.read(max_records=max_records, timeout=timeout))
            failing = group.create_task(self._fail.wait())
            await asyncio.wait([reading, failing], return_when=asyncio.FIRST_COMPLETED)
            failing.cancel()
            if not reading.done():
                reading.cancel()
        if reading.cancelled():
            raise Unavailable("the broker is gone", retry_after=0.01)
        return reading.result()


class FailingLog(MemoryBus):
    """A log whose token topic cannot be read while `fail` is set; who began to read it, and where, is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.fail = asyncio.Event()
        self.starts: asyncio.Queue[int | None] = asyncio.Queue()

    @asynccontextmanager
    async def reader(self, start: Mapping[TopicPartition, int | None]) -> AsyncIterator[Reader]:
        async with super().reader(start) as reader:
            if TOKENS.partition(0) not in start:
                yield reader
                return
            self.starts.put_nowait(start[TOKENS.partition(0)])
            yield Failing(reader, self.fail)


async def test_streams_wait_while_the_log_cannot_be_read() -> None:
    """Where reading fails once it goes on from where it stood, and streams lose nothing."""
    log = FailingLog()
    async with open_mesh(log=log) as mesh, mesh.client.generate("hi") as answer:
        assert await log.starts.get() is None
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one ")
        first = await anext(answer)
        log.fail.set()
        assert await log.starts.get() == 1
        log.fail.clear()
        await mesh.engine.say(job, "two", finish=LENGTH)
        assert isinstance(first, Tokens)
        assert first.text + await answer.read() == "one two"
        assert (await mesh.http.get("/readyz")).status_code == 200


async def test_streams_break_where_the_log_stays_unreadable() -> None:
    """Where reading fails again without having got further streams end with UNAVAILABLE, and their requests go on;
    reading goes on at the log's end, for the streams to come."""
    log = FailingLog()
    async with open_mesh(log=log) as mesh:
        async with mesh.client.generate("hi", cancel_on_exit=True, resume=False) as answer:
            await log.starts.get()
            await anext(answer)
            await mesh.engine.job()
            log.fail.set()
            with pytest.raises(Unavailable, match="the broker is gone"):
                await anext(answer)
            assert await log.starts.get() == 0
            assert await log.starts.get() is None
            log.fail.clear()
        async with mesh.client.generate("hi") as answer:
            await anext(answer)
            await mesh.engine.say(await mesh.engine.job(), "again", finish=LENGTH)
            assert await answer.read() == "again"
        await mesh.client.cancel("a-probe")
        assert of_client((await mesh.engine.cancelled()).request_id) == "a-probe"
