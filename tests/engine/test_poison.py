"""Requests of which engines die: few do, everybody else is answered, and what was given up is kept."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from holdfast import topics
from holdfast.bus import Bus, Headers, Position, TopicPartition
from holdfast.dead import dead_letters
from holdfast.errors import InternalError, Unavailable
from holdfast.memory import MemoryBus
from holdfast.ownership import MAX_STARTS
from holdfast.v1 import generation_pb2 as pb
from services.engine import dead, intake
from services.engine.sequence import StopRules
from tests.conftest import OpenBus
from tests.engine.engines import Poison, Running, engine, until
from tests.engine.fake_runner import expected_output
from tests.engine.records import REPLY, Answers, answers, cancel, publish, request

POISON = [21, 22]
SOURCE = topics.REQUESTS_INTERACTIVE.partition(2)


@pytest.fixture
async def memory() -> AsyncIterator[MemoryBus]:
    async with MemoryBus() as bus:
        await bus.create_topics(topics.TOPICS)
        yield bus


async def live(open_bus: OpenBus, name: str, poison: Poison, deaths: list[str]) -> None:
    """An engine, and another one in its place whenever it dies."""
    for number in itertools.count():
        try:
            async with (
                open_bus() as bus,
                engine(bus, name=f"{name}.{number}", max_sequences=8, drain_seconds=0, poison=poison),
            ):
                await asyncio.Event().wait()
        except* InternalError:
            deaths.append(f"{name}.{number}")


@asynccontextmanager
async def fleet(open_bus: OpenBus, poison: Poison) -> AsyncIterator[list[str]]:
    """Two of them; the block is given the names of those that died."""
    deaths: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        living = [tasks.create_task(live(open_bus, name, poison, deaths)) for name in ("first", "second")]
        yield deaths
        for each in living:
            each.cancel()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "poison",
    [Poison(POISON), Poison(POISON, num_known=5), Poison(POISON, num_own=1)],
    ids=["of the prompt", "some tokens on", "of the step after its first"],
)
async def test_a_poison_ends_few_engines_and_no_other_request(open_bus: OpenBus, poison: Poison) -> None:
    """It is read in the middle of others that share its partition and its batch. They have the text of an undisturbed
    engine; it has its tokens, an error that says why, and a dead letter."""
    prompts = {f"r{number}": [number + 1, number + 2] for number in range(8)}
    async with open_bus() as bus:
        await bus.create_topics(topics.TOPICS)
        for number, (request_id, prompt_ids) in enumerate(prompts.items()):
            await publish(
                bus, request(request_id, prompt_ids, max_tokens=20, ignore_eos=True), partition=2 + number % 2
            )
            if number == 3:
                await publish(bus, request("poison", POISON, max_tokens=20, ignore_eos=True))
        async with answers(bus, start=0) as heard, fleet(open_bus, poison) as deaths:
            await heard.finished("poison", *prompts)
        for request_id, prompt_ids in prompts.items():
            assert heard[request_id].token_ids == expected_output(prompt_ids, StopRules(20))
        assert MAX_STARTS <= len(deaths) <= MAX_STARTS + 1
        answer = heard["poison"]
        assert answer.token_ids == expected_output(POISON, StopRules(20))[: len(answer.token_ids)]
        assert len(answer.token_ids) == (poison.num_known or poison.num_own * MAX_STARTS)
        assert answer.finish is not None
        assert answer.finish.reason == pb.FINISH_REASON_ERROR
        assert "given up: 3 engines began this request" in answer.finish.error.message
        (letter,) = await dead_letters(bus)
        assert letter.request == request("poison", POISON, max_tokens=20, ignore_eos=True)
        assert (letter.request_id, letter.reason) == ("poison", answer.finish.error.message)
        assert letter.num_tokens == [len(answer.token_ids)]
        assert len(set(letter.epochs)) == MAX_STARTS
        assert (letter.source.partition, letter.request_offset) == (2, 2)


def announcement(request_id: str, *, epoch: int = 0) -> bytes:
    """What an engine has written that is gone, and that nothing else is known of."""
    source = pb.SourcePartition(request_class=pb.REQUEST_CLASS_INTERACTIVE, partition=SOURCE.partition)
    streams = [pb.StreamTokens(request_id=request_id)]
    return pb.TokenBatch(source=source, epoch=epoch, streams=streams).SerializeToString()


def running(held: Running) -> set[str]:
    """The requests that the scheduler has."""
    return {each.request_id for each in held.engine.requests._held if each.has_begun}


async def test_suspects_begin_one_at_a_time_and_hold_up_nobody_else(memory: MemoryBus) -> None:
    """The next one begins when the log has two tokens of the one before, or its end; a request that nobody died of begins
    beside it."""
    suspects = ["s0", "s1", "s2"]
    for request_id in suspects:
        await memory.publish(topics.TOKENS.partition(REPLY), announcement(request_id))
    async with answers(memory) as heard, engine(memory, max_sequences=8) as held:
        held.runner.hold()
        for request_id in suspects:
            await publish(memory, request(request_id, [1], max_tokens=1 if request_id == "s1" else 9, ignore_eos=True))
        await until(lambda: running(held) == {"s0"})
        await publish(memory, request("bystander", [1], max_tokens=30, ignore_eos=True))
        await until(lambda: running(held) == {"s0", "bystander"})
        await step_until(held, heard, "s0", 1)
        await publish(memory, request("other", [1], max_tokens=30, ignore_eos=True))
        await until(lambda: running(held) == {"s0", "bystander", "other"})
        held.runner.allow(1)
        await until(lambda: running(held) == {"s0", "bystander", "other", "s1"})
        assert len(heard["s0"].token_ids) < 9
        held.runner.allow()
        await heard.finished(*suspects, "bystander", "other")
        for request_id in suspects:
            assert heard[request_id].token_ids == expected_output([1], StopRules(1 if request_id == "s1" else 9))


async def step_until(held: Running, heard: Answers, request_id: str, num_tokens: int) -> None:
    """Lets a held engine go on step by step, until a request has so many tokens."""
    while len(heard[request_id].token_ids) < num_tokens:
        num_records = len(heard.records)
        held.runner.allow(1)
        await heard.until(lambda: len(heard.records) > num_records)  # noqa: B023
    assert len(heard[request_id].token_ids) == num_tokens


async def test_the_next_suspect_begins_where_one_is_cancelled_or_lost(memory: MemoryBus) -> None:
    """It is not the engine that ended with it."""
    for request_id in ("s0", "s1", "s2"):
        await memory.publish(topics.TOKENS.partition(REPLY), announcement(request_id))
    async with answers(memory) as heard, engine(memory, max_sequences=8) as held:
        held.runner.hold()
        await publish(memory, request("s0", [1], max_tokens=9))
        await until(lambda: running(held) == {"s0"})
        await publish(memory, request("s1", [1], max_tokens=9), partition=3)
        await publish(memory, request("s2", [1], max_tokens=9))
        await until(lambda: held.num_open() == 3)
        held.engine.intake.leave(topics.REQUESTS_INTERACTIVE.partition(3))
        await cancel(memory, "s0")
        held.runner.allow()
        await heard.finished("s0", "s2")
        assert heard["s1"].finish is None and not heard["s1"].token_ids


class Reluctant(MemoryBus):
    """A log that takes some records late, or not at once."""

    def __init__(self) -> None:
        super().__init__()
        self.is_late = False
        """Whether it acks announcements when `late` says so."""
        self.late: list[asyncio.Future[None]] = []
        self.num_refused = 0
        self.refuses = 0
        """How many dead letters it does not take."""

    async def send(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> asyncio.Future[int]:
        if partition == topics.DEAD.partition(0) and self.refuses:
            self.refuses -= 1
            self.num_refused += 1
            raise Unavailable("no broker")
        acked = await super().send(partition, value, key=key, headers=headers)
        if not self.is_late or partition != topics.TOKENS.partition(REPLY) or not is_announcement(value):
            return acked
        self.late.append(asyncio.get_running_loop().create_future())
        return asyncio.ensure_future(after(self.late[-1], acked.result()))


async def after(event: asyncio.Future[None], offset: int) -> int:
    await event
    return offset


def is_announcement(value: bytes) -> bool:
    batch = pb.TokenBatch.FromString(value)
    return bool(batch.streams) and all(not each.token_ids and not each.HasField("finish") for each in batch.streams)


@pytest.fixture
async def reluctant(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reluctant]:
    monkeypatch.setattr(dead, "RETRY_SECONDS", 0.0)
    async with Reluctant() as bus:
        await bus.create_topics(topics.TOPICS)
        yield bus


async def test_what_others_may_have_begun_waits_until_the_log_has_its_announcement(reluctant: Reluctant) -> None:
    """What is new does not. What comes at once is announced at once."""
    reluctant.is_late = True
    async with answers(reluctant) as heard:
        for request_id in ("a", "b"):
            await publish(reluctant, request(request_id, [1]))
        async with engine(reluctant) as held:
            await until(lambda: len(reluctant.late) == 1)
            await heard.until(lambda: len(heard.markers) == 2)
            assert [each.request_id for each in heard.markers[1].streams] == ["a", "b"]
            assert running(held) == set()
            start = heard.start(2)
            assert start["reply_start_epoch"]
            await publish(reluctant, request("new", [1], model="fake", **start))
            await until(lambda: running(held) == {"new"})
            reluctant.late[0].set_result(None)
            await until(lambda: running(held) >= {"a", "b"})
            await until(lambda: len(reluctant.late) == 2)
            reluctant.late[1].set_result(None)
            await heard.finished("a", "b", "new")


async def given_up(bus: Bus, **fields: Any) -> None:
    """A request that three engines began in vain."""
    for epoch in range(MAX_STARTS):
        await bus.publish(topics.TOKENS.partition(REPLY), announcement("a", epoch=1 + epoch))
    await publish(bus, request("a", [1], **fields))


async def test_a_stream_ends_when_the_log_has_its_dead_letter(reluctant: Reluctant) -> None:
    """Until then it is tried again; and nothing is committed before the stream has its end."""
    reluctant.refuses = 3
    async with answers(reluctant) as heard:
        await given_up(reluctant)
        async with engine(reluctant, incarnation=1) as running:
            await heard.finished("a")
            assert reluctant.num_refused == 3
            assert heard["a"].finish is not None and "given up" in heard["a"].finish.error.message
            assert running.metric("dead_letters_total") == 1
            assert len(await dead_letters(reluctant)) == 1
        assert running.engine.steps.load.num_generated_tokens == 0
    lag = await reluctant.lag(topics.ENGINES, [topics.REQUESTS_INTERACTIVE])
    assert lag[SOURCE].committed == Position(1)


async def test_a_request_that_is_lost_while_its_letter_waits_is_left_to_its_new_owner(reluctant: Reluctant) -> None:
    """Nothing of it is told or committed here."""
    reluctant.refuses = 1 << 30
    async with answers(reluctant) as heard:
        await given_up(reluctant)
        async with engine(reluctant, drain_seconds=0, incarnation=1) as held:
            await until(lambda: reluctant.num_refused > 2)
            held.engine.intake.leave(SOURCE)
            num_refused = reluctant.num_refused
            reluctant.refuses = 0
            await publish(reluctant, request("b", [1]), partition=3)
            await heard.finished("b")
            assert reluctant.num_refused == num_refused
        assert heard["a"].finish is None and await dead_letters(reluctant) == []
        async with engine(reluctant, incarnation=1):
            await heard.finished("a")
        assert len(await dead_letters(reluctant)) == 1


async def test_a_letter_that_is_too_large_says_where_the_request_lies(memory: MemoryBus) -> None:
    """For a request may be as large as a record."""
    async with answers(memory) as heard:
        await given_up(memory, tenant="t" * 999_800)
        async with engine(memory, incarnation=1):
            await heard.finished("a")
    (letter,) = await dead_letters(memory)
    assert not letter.HasField("request")
    assert (letter.request_id, letter.source.partition, letter.request_offset) == ("a", SOURCE.partition, 0)


async def test_a_request_that_somebody_cancelled_is_not_given_up(memory: MemoryBus) -> None:
    """Nobody wants it."""
    async with answers(memory) as heard:
        await given_up(memory)
        await cancel(memory, "a")
        async with engine(memory, incarnation=1):
            await heard.finished("a")
    assert heard["a"].finish is not None and heard["a"].finish.reason == pb.FINISH_REASON_CANCELLED
    assert await dead_letters(memory) == []


async def test_an_answer_may_pass_through_any_number_of_hands(
    memory: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when engines end one after the other, without a word: each has told two tokens of it."""
    monkeypatch.setattr(intake, "FAREWELL_SECONDS", 0.0)
    async with answers(memory) as heard:
        await publish(memory, request("a", [1], max_tokens=30, ignore_eos=True))
        for number in range(3 * MAX_STARTS):
            async with engine(memory, name=f"engine-{number}", drain_seconds=0) as running:
                running.runner.hold()
                before = len(heard["a"].token_ids)
                while len(heard["a"].token_ids) < before + 2:
                    num_records = len(heard.records)
                    running.runner.allow(1)
                    await heard.until(lambda: len(heard.records) > num_records)  # noqa: B023
        async with engine(memory):
            await heard.finished("a")
    assert heard["a"].token_ids == expected_output([1], StopRules(30))


def has_let_go(heard: Answers) -> bool:
    """Whether the newest record that brings no tokens says that an engine outlived a request."""
    return any(stream.let_go for stream in heard.markers[-1].streams)


async def test_an_engine_that_loses_a_request_and_outlives_it_is_not_counted(memory: MemoryBus) -> None:
    """It says so once no step computes anything of it. So partitions may move as often as they like before the first
    token; and what the record says is nothing to whoever reads the answer."""
    async with answers(memory) as heard:
        await publish(memory, request("a", [1], max_tokens=30, ignore_eos=True))
        for number in range(2 * MAX_STARTS):
            async with engine(memory, name=f"engine-{number}", drain_seconds=0) as held:
                held.runner.hold()
                if number == 0:
                    held.runner.allow(3)
                await until(lambda: running(held) == {"a"})
                held.engine.intake.leave(SOURCE)
                await heard.catch_up()
                assert not has_let_go(heard)
                held.runner.allow()
                await heard.until(lambda: has_let_go(heard))
        async with engine(memory):
            await heard.finished("a")
    assert heard["a"].token_ids == expected_output([1], StopRules(30))
    assert await dead_letters(memory) == []


async def test_an_engine_that_leaves_says_what_it_has_outlived(memory: MemoryBus) -> None:
    """Though it has no time to come to an end with it."""
    async with answers(memory) as heard, asyncio.TaskGroup() as tasks:
        await publish(memory, request("a", [1], max_tokens=90, ignore_eos=True))
        async with engine(memory, drain_seconds=0) as held:
            held.runner.hold()
            await until(lambda: running(held) == {"a"})
            tasks.create_task(release_when_draining(held))
        await heard.until(lambda: bool(heard.markers) and has_let_go(heard))
        assert heard["a"].finish is None


async def release_when_draining(held: Running) -> None:
    await until(lambda: held.engine.intake.is_draining)
    held.runner.allow()
