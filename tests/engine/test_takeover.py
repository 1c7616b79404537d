"""Engines come and go in the middle of everything, and every request is answered as if nothing had happened."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from holdfast import topics
from holdfast.bus import Bus, Position
from holdfast.memory import MemoryBus
from holdfast.v1 import generation_pb2 as pb
from services.engine.sequence import StopRules
from tests.engine.engines import Running, engine, until
from tests.engine.fake_runner import EOS, expected_output, possible_output
from tests.engine.records import REPLY, Answers, answers, cancel, publish, request


async def live(bus: MemoryBus, name: str, dice: random.Random, leaves: asyncio.Event | None, taste: int = 0) -> None:
    """An engine that leaves without draining, in the middle of a step or between two."""
    async with engine(
        bus, name=name, max_sequences=3, num_blocks=24, drain_seconds=0, lookahead=dice.randrange(3), taste=taste
    ) as e:
        if leaves is None:
            await asyncio.Event().wait()
        assert leaves is not None
        await _work_a_little(e, dice)
        leaves.set()


async def _work_a_little(running: Running, dice: random.Random) -> None:
    """Until a random number of tokens was generated, or there is nothing to do."""
    enough = running.engine.steps.load.num_generated_tokens + dice.randrange(60)
    turns = 0

    def tired() -> bool:
        nonlocal turns
        turns += 1
        return turns > 300 or running.engine.steps.load.num_generated_tokens >= enough

    await until(tired)


@pytest.mark.parametrize("seed", range(8))
async def test_whoever_comes_and_goes_every_request_is_answered_once(seed: int) -> None:
    """Short-lived engines join, freeze, wake and leave while requests arrive and some are cancelled; in the end one
    stays. By the readers' rule every stream has no hole, no doubled token and the text of one undisturbed engine."""
    dice = random.Random(seed)
    prompts: dict[str, list[int]] = {}
    texts: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    async with MemoryBus() as bus:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard, asyncio.TaskGroup() as tasks:
            for generation in range(6):
                leaves = asyncio.Event()
                tasks.create_task(live(bus, f"engine-{generation}", dice, leaves))
                for _ in range(dice.randrange(6)):
                    request_id = f"r{len(prompts)}"
                    prompts[request_id] = [dice.randrange(1, 4) for _ in range(dice.randrange(1, 12))]
                    max_tokens = dice.randrange(1, 40)
                    stop = StopRules(max_tokens, stop_token_ids=frozenset({EOS}))
                    texts[request_id] = expected_output(prompts[request_id], stop)
                    message = request(request_id, prompts[request_id], max_tokens=max_tokens)
                    await publish(bus, message, partition=dice.randrange(4), batch=dice.random() < 0.3)
                    if dice.random() < 0.15:
                        cancelled.add(request_id)
                        await cancel(bus, request_id)
                if dice.random() < 0.4 and (members := bus.members("holdfast-engines-interactive")):
                    with bus.frozen(dice.choice(members)):
                        for _ in range(dice.randrange(50)):
                            await asyncio.sleep(0)
                if dice.random() < 0.6:
                    await leaves.wait()
            last = tasks.create_task(live(bus, "last", dice, None))
            await heard.finished(*prompts)
            last.cancel()
    for request_id, text in texts.items():
        answer = heard[request_id]
        assert answer.finish is not None
        if answer.finish.reason == pb.FINISH_REASON_CANCELLED:
            assert request_id in cancelled
            assert answer.token_ids == text[: len(answer.token_ids)]
        else:
            assert answer.token_ids == text


@pytest.mark.parametrize("seed", range(8))
async def test_engines_that_would_say_something_else_go_on_from_what_was_said(seed: int) -> None:
    """Every engine continues a text in its own way. Still each stream is one text to its readers: every token was added by
    some engine to exactly those before it."""
    dice = random.Random(100 + seed)
    prompts: dict[str, list[int]] = {}
    async with MemoryBus() as bus:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard, asyncio.TaskGroup() as tasks:
            for taste in range(6):
                leaves = asyncio.Event()
                tasks.create_task(live(bus, f"engine-{taste}", dice, leaves, taste))
                for _ in range(dice.randrange(6)):
                    request_id = f"r{len(prompts)}"
                    prompts[request_id] = [dice.randrange(1, 4) for _ in range(dice.randrange(1, 12))]
                    if dice.random() < 0.7:
                        await heard.catch_up()
                    partition, batch = dice.randrange(4), dice.random() < 0.3
                    start = heard.start(partition, batch=batch)
                    length = dice.randrange(20, 60)
                    message = request(request_id, prompts[request_id], max_tokens=length, ignore_eos=True, **start)
                    await publish(bus, message, partition=partition, batch=batch)
                if dice.random() < 0.4 and (members := bus.members("holdfast-engines-interactive")):
                    with bus.frozen(dice.choice(members)):
                        for _ in range(dice.randrange(50)):
                            await asyncio.sleep(0)
                if dice.random() < 0.6:
                    await leaves.wait()
            last = tasks.create_task(live(bus, "last", dice, None, taste=6))
            await heard.finished(*prompts)
            last.cancel()
    for request_id, prompt_ids in prompts.items():
        finish = heard[request_id].finish
        assert finish is not None and finish.reason == pb.FINISH_REASON_LENGTH
        assert finish.usage.completion_tokens == len(heard[request_id].token_ids)
        assert possible_output(prompt_ids, heard[request_id].token_ids, range(7))


@pytest.fixture
async def memory() -> AsyncIterator[MemoryBus]:
    async with MemoryBus() as bus:
        await bus.create_topics(topics.TOPICS)
        yield bus


async def begun(running: Running, heard: Answers, *keys: str | tuple[str, int], num_tokens: int) -> None:
    """Until each of these has so many tokens in the log; then the engine is held."""
    running.runner.hold()
    while any(len(heard[key].token_ids) < num_tokens for key in keys):
        num_records = len(heard.records)
        running.runner.allow(1)
        await heard.until(lambda: len(heard.records) > num_records)  # noqa: B023


async def test_a_text_goes_on_in_the_middle(bus: Bus) -> None:
    """The first engine leaves after some tokens; the second adds its own to them, and tells none again."""
    await bus.create_topics(topics.TOPICS)
    async with answers(bus) as heard:
        async with engine(bus, name="first", taste=1, drain_seconds=0) as first:
            await publish(bus, request("a", [1, 2, 3], max_tokens=9, ignore_eos=True))
            await begun(first, heard, "a", num_tokens=4)
        said = list(heard["a"].token_ids)
        assert 4 <= len(said) < 9
        async with engine(bus, name="second", taste=2) as second:
            await heard.finished("a")
            assert second.metric("resumed_requests_total") == 1
            assert second.metric("resumed_tokens_total") == len(said)
    text = heard["a"].token_ids
    assert text[: len(said)] == said and len(text) == 9
    assert text[len(said) :] == expected_output([1, 2, 3, *said], StopRules(9 - len(said)), taste=2)
    assert heard.num_repeated == 0
    assert heard["a"].finish == pb.Finish(
        reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(prompt_tokens=3, completion_tokens=9)
    )


async def test_nothing_is_told_before_the_marker(memory: MemoryBus) -> None:
    """Of an epoch the first record in a reply partition has no stream, and is the only one; of a request the first has no
    token."""
    async with answers(memory) as heard, engine(memory):
        for request_id in ("a", "b"):
            await publish(memory, request(request_id, [1], **heard.start(2)))
            await heard.finished(request_id)
    marker, *announced = heard.markers
    assert not marker.streams and marker.epoch == heard.records[0].epoch
    assert [each.request_id for batch in announced for each in batch.streams] == ["a", "b"]
    async with memory.reader({topics.TOKENS.partition(REPLY): 0}) as reader:
        records = [pb.TokenBatch.FromString(record.value) for record in await reader.read()]
    assert records[0] == marker
    for request_id in ("a", "b"):
        first, *rest = (each for record in records for each in record.streams if each.request_id == request_id)
        assert not first.token_ids and rest


async def test_choices_stand_where_each_of_them_stood(memory: MemoryBus) -> None:
    """One had ended: it is left alone, and the request is done with the other."""
    stop = [expected_output([5], StopRules(1), choice)[0] for choice in (0, 1)]
    assert stop[0] != stop[1]
    async with answers(memory) as heard:
        async with engine(memory, name="first", drain_seconds=0) as first:
            message = request("a", [5], max_tokens=8, ignore_eos=True, num_choices=2)
            message.stop.stop_token_ids.append(stop[0])
            await publish(memory, message)
            await begun(first, heard, ("a", 1), num_tokens=3)
        ended, said = heard["a", 0], list(heard["a", 1].token_ids)
        assert ended.finish is not None and heard["a", 1].finish is None
        num_tokens = len(ended.token_ids)
        async with engine(memory, name="second", taste=3) as second:
            await heard.finished(("a", 1))
            assert second.metric("resumed_requests_total") == 1
            await second.until_idle()
        assert len(heard["a", 0].token_ids) == num_tokens
        assert heard["a", 1].token_ids[: len(said)] == said
    lag = await memory.lag(topics.ENGINES, [topics.REQUESTS_INTERACTIVE])
    assert lag[topics.REQUESTS_INTERACTIVE.partition(2)].committed is not None


async def test_what_is_answered_but_not_committed_is_not_answered_again(memory: MemoryBus) -> None:
    """The next owner finds its end in the log, and commits it."""
    async with answers(memory) as heard:
        async with engine(memory, name="first") as first:
            first.engine.intake.commit = do_nothing  # type: ignore[method-assign]
            await publish(memory, request("a", [1]))
            await heard.finished("a")
        num_records = len(heard.records)
        async with engine(memory, name="second", taste=1):
            pass
        async with engine(memory, name="third", taste=2):
            await publish(memory, request("b", [1]))
            await heard.finished("b")
        assert {stream.request_id for record in heard.records[num_records:] for stream in record.streams} == {"b"}
    lag = await memory.lag(topics.ENGINES, [topics.REQUESTS_INTERACTIVE])
    assert lag[topics.REQUESTS_INTERACTIVE.partition(2)].committed == Position(2)


async def do_nothing() -> None:
    pass


async def test_a_text_with_a_hole_ends_with_an_error(memory: MemoryBus) -> None:
    """Whatever brought it about: it is ended, and committed, for nobody could go on."""
    source = pb.SourcePartition(request_class=pb.REQUEST_CLASS_INTERACTIVE, partition=2)
    torn = pb.TokenBatch(
        source=source, epoch=0, streams=[pb.StreamTokens(request_id="a", first_index=3, token_ids=[7])]
    )
    async with answers(memory) as heard:
        heard.is_lenient = True
        await memory.publish(topics.TOKENS.partition(REPLY), torn.SerializeToString())
        await publish(memory, request("a", [1]))
        async with engine(memory) as running:
            await heard.finished("a")
            await running.until_idle()
    finish = heard["a"].finish
    assert finish is not None and finish.error.message.startswith("nobody can go on: choice 0: tokens from 3")


async def test_a_request_whose_answer_the_log_keeps_no_longer_is_not_computed_again() -> None:
    """As after a group was made anew: no cursor of it is good any more, so nobody could read it."""
    async with MemoryBus(max_topic_bytes=1_000_000) as bus:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard:
            await publish(bus, request("a", [1]))
            for _ in range(2):  # and the log forgets what was before
                filler = pb.TokenBatch(streams=[pb.StreamTokens(request_id="x" * 600_000)])
                await bus.publish(topics.TOKENS.partition(REPLY), filler.SerializeToString())
                await heard.catch_up()
            async with engine(bus) as running:
                await heard.finished("a")
                await running.until_idle()
        finish = heard["a"].finish
    assert finish is not None and "no longer holds the beginning of its answer" in finish.error.message
    assert not heard["a"].token_ids


async def test_an_owner_that_was_outbid_says_nothing(memory: MemoryBus) -> None:
    """Where a later epoch has written already it leaves the partition's requests to whoever wrote it."""
    source = pb.SourcePartition(request_class=pb.REQUEST_CLASS_INTERACTIVE, partition=2)
    later = pb.TokenBatch(source=source, epoch=1 << 40)
    async with answers(memory) as heard:
        await memory.publish(topics.TOKENS.partition(REPLY), later.SerializeToString())
        async with engine(memory, drain_seconds=0) as running:
            await publish(memory, request("a", [1]))
            await publish(memory, request("b", [1]), partition=3)
            await heard.finished("b")
            await until(lambda: running.num_open() == 0)
        assert all(stream.request_id == "b" for record in heard.records for stream in record.streams)


async def test_a_cancellation_that_comes_while_the_log_is_read_counts(memory: MemoryBus) -> None:
    """The text ends where the first engine left it."""
    async with answers(memory) as heard:
        async with engine(memory, name="first", drain_seconds=0) as first:
            await publish(memory, request("a", [1], max_tokens=50, ignore_eos=True))
            await begun(first, heard, "a", num_tokens=3)
        said = list(heard["a"].token_ids)
        async with engine(memory, name="second") as second:
            second.runner.hold()
            await until(lambda: second.num_open() == 1)
            await cancel(memory, "a")
            await until(lambda: second.engine.intake._cancels.mean("a", None, accepted_at=None, written_ms=0))
            second.runner.allow()
            await heard.finished("a")
        finish = heard["a"].finish
        assert finish is not None and finish.reason == pb.FINISH_REASON_CANCELLED
        assert heard["a"].token_ids[: len(said)] == said
