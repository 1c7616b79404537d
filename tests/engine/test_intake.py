"""Which requests an engine takes, and when it lets go of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2

from holdfast import topics
from holdfast.bus import Bus, Position
from holdfast.errors import InternalError
from holdfast.memory import MemoryBus
from holdfast.v1 import generation_pb2 as pb
from services.engine import cancels
from services.engine.batch import Step
from services.engine.requests import Request
from services.engine.sequence import StopRules
from tests.conftest import OpenBus
from tests.engine.engines import Running, engine, until
from tests.engine.fake_runner import EOS, Launched, expected_output
from tests.engine.records import Answers, answers, cancel, publish, request

GROUP = "holdfast-engines-interactive"


def expected(prompt_ids: list[int], *, max_tokens: int = 4, choice: int = 0) -> list[int]:
    return expected_output(prompt_ids, StopRules(max_tokens, stop_token_ids=frozenset({EOS})), choice)


async def until_next_millisecond() -> None:
    """Records that follow have a later timestamp than those before."""
    now = time.time_ns() // 10**6
    await until(lambda: time.time_ns() // 10**6 > now)


async def step_until(running: Running, heard: Answers, holds: Callable[[], bool]) -> None:
    """Lets a held engine go on step by step, until something holds."""
    while not holds():
        num_records = len(heard.records)
        running.runner.allow(1)
        await heard.until(lambda: len(heard.records) > num_records)  # noqa: B023


@pytest.fixture
async def memory() -> AsyncIterator[MemoryBus]:
    async with MemoryBus() as bus:
        await bus.create_topics(topics.TOPICS)
        yield bus


async def test_a_request_is_answered(bus: Bus) -> None:
    """From its record to the records of its tokens: in order, with prefix hashes that fit, and an end with usage."""
    await bus.create_topics(topics.TOPICS)
    async with answers(bus) as heard, engine(bus):
        await publish(bus, request("a", [1, 2, 3], max_tokens=6))
        await heard.finished("a")
        assert heard["a"].token_ids == expected([1, 2, 3], max_tokens=6)
        assert heard["a"].finish == pb.Finish(
            reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(prompt_tokens=3, completion_tokens=6)
        )
        source = heard.records[0].source
        assert (source.request_class, source.partition) == (pb.REQUEST_CLASS_INTERACTIVE, 2)
        assert heard.records[0].engine == "engine"


async def test_what_is_answered_is_committed_and_not_answered_again(bus: Bus) -> None:
    """Leaving, an engine commits what it did; the next one finds nothing to do."""
    await bus.create_topics(topics.TOPICS)
    async with answers(bus) as heard:
        async with engine(bus):
            offset = await publish(bus, request("a", [1]))
            await heard.finished("a")
        lag = await bus.lag(GROUP, [topics.REQUESTS_INTERACTIVE])
        assert lag[topics.REQUESTS_INTERACTIVE.partition(2)].committed == Position(offset + 1)
        async with engine(bus):
            await publish(bus, request("b", [1]))
            await heard.finished("b")
        assert heard.num_repeated == 0
        assert {stream.request_id for record in heard.records[4:] for stream in record.streams} == {"b"}


async def test_no_more_is_taken_than_there_are_slots(memory: MemoryBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all slots in use requests stay in the log; each slot that becomes free takes the next one."""
    async with answers(memory) as heard, engine(memory, max_sequences=2) as running:
        requests, nums_open = running.engine.requests, list[int]()
        add = requests.add

        def noted(request: Request) -> None:
            add(request)
            nums_open.append(running.num_open())

        monkeypatch.setattr(requests, "add", noted)
        running.runner.hold()
        ids = [f"r{number}" for number in range(5)]
        for number, request_id in enumerate(ids):
            await publish(memory, request(request_id, [number + 1], max_tokens=3), partition=number)
        await until(lambda: running.num_open() == 2)
        for request_id in ids:
            await step_until(running, heard, lambda: heard[request_id].finish is not None)  # noqa: B023
        assert len(nums_open) == 5
        assert max(nums_open) == 2


async def test_slots_are_not_given_to_both_classes(memory: MemoryBus) -> None:
    """Of many requests of both classes that come at once no more than one is taken beyond the slots."""
    async with answers(memory) as heard, engine(memory, max_sequences=20, num_blocks=200) as running:
        running.runner.hold()
        ids = [f"{kind}{number}" for kind in "ib" for number in range(30)]
        for request_id in ids:
            await publish(memory, request(request_id, [1], max_tokens=2), batch=request_id.startswith("b"))
        await until(lambda: running.num_open(interactive=False) > 0)
        assert (running.num_open(), running.num_open(interactive=False)) == (20, 1)
        running.runner.allow()
        await heard.finished(*ids)


async def test_slots_that_batch_requests_took_meanwhile_are_not_promised(memory: MemoryBus) -> None:
    """Interactive requests that come long after an engine filled with batch ones leave those their share."""
    async with answers(memory) as heard, engine(memory, max_sequences=20, num_blocks=200) as running:
        running.runner.hold()
        batch, interactive = ([f"{kind}{number}" for number in range(30)] for kind in "bi")
        for request_id in batch:
            await publish(memory, request(request_id, [1], max_tokens=2), batch=True)
        await until(lambda: running.num_open(interactive=False) == 20)
        for request_id in interactive:
            await publish(memory, request(request_id, [1], max_tokens=2))
        await until(lambda: running.num_open() > 0)
        assert (running.num_open(), running.num_open(interactive=False)) == (18, 20)
        running.runner.allow()
        await heard.finished(*batch, *interactive)


async def test_batch_requests_get_a_tenth_while_interactive_ones_wait(memory: MemoryBus) -> None:
    """Of what is answered while the log holds more of both than there are slots."""
    async with answers(memory) as heard, engine(memory, max_sequences=20, num_blocks=400) as running:
        running.runner.hold()
        batch, interactive = ([f"{kind}{number}" for number in range(400)] for kind in "bi")
        for ids in (batch, interactive):
            for number, request_id in enumerate(ids):
                message = request(request_id, [1, 2], max_tokens=8, ignore_eos=True)
                await publish(memory, message, partition=number % 32, batch=ids is batch)
        await until(lambda: running.num_open() > 0)
        running.runner.allow()

        def num_answered(ids: list[str]) -> int:
            return sum(heard[request_id].finish is not None for request_id in ids)

        await heard.until(lambda: num_answered(interactive) >= 40)  # batch ones filled the slots first
        before = num_answered(batch), num_answered(interactive)
        await heard.until(lambda: num_answered(interactive) >= 340)
        answered = num_answered(batch) - before[0], num_answered(interactive) - before[1]
        assert 0.08 <= answered[0] / sum(answered) <= 0.25, "more only where slots were free for a moment"
        await heard.finished(*interactive)


def begun(running: Running, *request_ids: str) -> bool:
    """Whether the scheduler has all of these."""
    found = [running.engine.requests.running(each) for each in request_ids]
    return all(each is not None and each.has_begun for each in found)


async def test_of_a_single_slot_batch_requests_have_none(memory: MemoryBus) -> None:
    """However many of them wait, an interactive one comes next."""
    async with answers(memory) as heard, engine(memory, max_sequences=1) as running:
        running.runner.hold()
        batch = [f"b{number}" for number in range(5)]
        for number, request_id in enumerate(batch):
            await publish(memory, request(request_id, [number + 1], max_tokens=3), batch=True)
        await until(lambda: running.num_open(interactive=False) == 1)
        await publish(memory, request("i", [9], max_tokens=3))
        await until(lambda: begun(running, "i"))
        running.runner.allow()
        await heard.finished("i", *batch)
        order = [each.request_id for record in heard.records for each in record.streams if each.HasField("finish")]
        assert order[0] == "i"


async def test_interactive_requests_take_the_slots_of_batch_ones(memory: MemoryBus) -> None:
    """An engine full of batch requests still takes an interactive one, which runs at once; the batch request that
    yields its slot is answered in full later."""
    async with answers(memory) as heard, engine(memory, max_sequences=2) as running:
        running.runner.hold()
        for number in range(3):
            await publish(memory, request(f"b{number}", [number], max_tokens=100, ignore_eos=True), batch=True)
        await until(lambda: begun(running, "b0", "b1"))
        running.runner.allow(5)
        await heard.until(lambda: bool(heard["b0"].token_ids and heard["b1"].token_ids))
        await publish(memory, request("i", [9], max_tokens=3, ignore_eos=True))
        await until(lambda: running.num_open() == 1)
        await until(lambda: begun(running, "i"))
        running.runner.allow(5)
        await heard.finished("i")
        assert running.engine.steps.load.num_preemptions == 1
        running.runner.allow()
        await heard.finished("b0", "b1", "b2")
        for number in range(3):
            assert heard[f"b{number}"].token_ids == expected_output([number], StopRules(100))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"model": "other"}, "serves 'fake'"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [99]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 200}, "prompt_token_ids"),
        ({"num_choices": 0}, "num_choices"),
        ({"num_choices": 1000}, "num_choices"),
        ({"grammar": "json"}, "grammar"),
        ({"sampling": pb.SamplingParams(temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": pb.SamplingParams(top_p=0)}, "sampling.top_p"),
        ({"sampling": pb.SamplingParams(top_k=0)}, "sampling.top_k"),
        ({"sampling": pb.SamplingParams(logprobs=21)}, "sampling.logprobs"),
        ({"sampling": pb.SamplingParams(logit_bias={99: 1.0})}, "sampling.logit_bias"),
        (
            {"sampling": pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))},
            "logit_bias may have at most 1024",
        ),
        ({"stop": pb.StopRules(max_tokens=0)}, "stop.max_tokens"),
        ({"stop": pb.StopRules(stop_token_ids=[99])}, "stop.stop_token_ids"),
        ({"stop": pb.StopRules(stop_token_ids=range(2000))}, "stop_token_ids may have at most 1152"),
    ],
)
async def test_a_request_that_cannot_be_honoured_is_told_why(memory: MemoryBus, wrong: Any, field: str) -> None:
    """Every choice ends with an error that names the field; the engine goes on."""
    message = request("bad", [1])
    for name, value in wrong.items():
        message.ClearField(name)
        message.MergeFrom(pb.GenerationRequest(**{name: value}))
    async with answers(memory) as heard, engine(memory):
        await publish(memory, message)
        await publish(memory, request("good", [1]))
        await heard.finished("bad", "good")
        finish = heard["bad"].finish
        assert finish is not None
        assert finish.reason == pb.FINISH_REASON_ERROR
        assert field in finish.error.message
        assert finish.error.code in (3, 5)
        assert heard["good"].token_ids == expected([1])


async def test_what_is_no_request_is_passed_over(memory: MemoryBus) -> None:
    """Bytes that are no request, one without an id, and one without a place to answer are counted and committed."""
    async with answers(memory) as heard, engine(memory) as running:
        where = topics.REQUESTS_INTERACTIVE.partition(2)
        await memory.publish(where, b"\xff\xff\xff")
        await memory.publish(where, b"")
        await publish(memory, request("nowhere", [1], reply_partition=99))
        await publish(memory, request("good", [1]))
        await heard.finished("good")
        assert running.metric("unreadable_records_total") == 3
    lag = await memory.lag(GROUP, [topics.REQUESTS_INTERACTIVE])
    assert lag[where].committed == Position(4)


async def test_a_request_past_its_deadline_is_not_begun(memory: MemoryBus) -> None:
    """It ends with DEADLINE and no token."""
    late = request("late", [1])
    late.deadline.FromSeconds(int(time.time()) - 1)
    async with answers(memory) as heard, engine(memory):
        await publish(memory, late)
        await heard.finished("late")
        assert heard["late"].finish is not None
        assert heard["late"].finish.reason == pb.FINISH_REASON_DEADLINE
        assert heard["late"].token_ids == []


async def test_choices_are_answered_each_for_itself(memory: MemoryBus) -> None:
    """A request for three choices gets three ends, of which each can be cancelled alone."""
    async with answers(memory) as heard, engine(memory) as running:
        running.runner.hold()
        await publish(memory, request("a", [1, 2, 3], num_choices=3, max_tokens=100, ignore_eos=True))
        await cancel(memory, "a", 1)
        await step_until(running, heard, lambda: heard["a", 1].finish is not None)
        running.runner.allow()
        await heard.finished(("a", 0), ("a", 1), ("a", 2))
        for choice in (0, 2):
            assert heard["a", choice].token_ids == expected_output([1, 2, 3], StopRules(100), choice)
        finish = heard["a", 1].finish
        assert finish is not None
        assert finish.reason == pb.FINISH_REASON_CANCELLED


async def test_cancelling_ends_a_running_request_and_frees_what_it_held(memory: MemoryBus) -> None:
    """Its stream ends with CANCELLED and the tokens so far; its slot and blocks are free at once."""
    async with answers(memory) as heard, engine(memory) as running:
        running.runner.hold()
        await publish(memory, request("a", [1, 2], max_tokens=190, ignore_eos=True))
        running.runner.allow(3)
        await heard.until(lambda: len(heard["a"].token_ids) == 3)
        await cancel(memory, "a")
        await step_until(running, heard, lambda: heard["a"].finish is not None)
        assert heard["a"].finish is not None
        assert heard["a"].finish.reason == pb.FINISH_REASON_CANCELLED
        assert heard["a"].finish.usage == pb.Usage(prompt_tokens=2, completion_tokens=len(heard["a"].token_ids))
        await running.until_idle()
        assert running.metric("request_success_total", finished_reason="cancelled") == 1


async def test_a_request_cancelled_before_it_was_read_is_not_begun(memory: MemoryBus) -> None:
    """A cancellation is remembered for a request that is still in the log; a request written after it, under the same
    id, is another one and runs."""
    async with answers(memory) as heard, engine(memory, max_sequences=1) as running:
        running.runner.hold()
        await publish(memory, request("a", [1], max_tokens=100, ignore_eos=True))
        await until(lambda: running.num_open() == 1)
        await publish(memory, request("b", [1]))
        await cancel(memory, "b")
        await cancel(memory, "a")
        running.runner.allow()
        await heard.finished("a", "b")
        assert heard["b"].finish is not None
        assert heard["b"].finish.reason == pb.FINISH_REASON_CANCELLED
        assert heard["b"].token_ids == []

        await cancel(memory, "c")
        await until_next_millisecond()
        await publish(memory, request("c", [1]))
        await heard.finished("c")
        assert heard["c"].token_ids == expected([1])


async def test_a_request_cancelled_while_no_engine_was_there_is_not_begun(bus: Bus) -> None:
    """An engine that starts hears first what was cancelled meanwhile: neither a request that nobody took runs, nor one
    that an engine left behind runs again."""
    await bus.create_topics(topics.TOPICS)
    async with answers(bus) as heard:
        async with engine(bus, drain_seconds=0) as running:
            running.runner.hold()
            await publish(bus, request("left", [1], max_tokens=100))
            await until(lambda: running.num_open() == 1)
        await publish(bus, request("unread", [1]))
        await cancel(bus, "left")
        await cancel(bus, "unread")
        async with engine(bus):
            await heard.finished("left", "unread")
        for request_id in ("left", "unread"):
            finish = heard[request_id].finish
            assert finish is not None
            assert finish.reason == pb.FINISH_REASON_CANCELLED
            assert heard[request_id].token_ids == []


async def test_an_engine_that_starts_hears_no_more_than_it_can_remember(
    memory: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was cancelled before it started only the newest is read."""
    monkeypatch.setattr(cancels, "MAX_CANCELS", 2)
    async with answers(memory) as heard:
        for request_id in ("a", "b", "c"):
            await publish(memory, request(request_id, [1]))
        for request_id in ("a", "b", "c"):
            await cancel(memory, request_id)
        async with engine(memory):
            await heard.finished("a", "b", "c")
        assert heard["a"].token_ids == expected([1])
        assert heard["b"].token_ids == heard["c"].token_ids == []


async def test_a_late_cancellation_is_not_meant_for_a_request_written_after_it(memory: MemoryBus) -> None:
    """A cancellation that is read when the id has been used again ends nothing: not the request that runs now."""
    async with answers(memory) as heard, engine(memory) as running:
        running.runner.hold()
        before = time.time_ns() // 10**6
        await until_next_millisecond()
        await publish(memory, request("a", [1], max_tokens=6, ignore_eos=True))
        await until(lambda: running.num_open() == 1)
        running.engine.intake._cancel(pb.Cancel(request_id="a"), before)
        running.runner.allow()
        await heard.finished("a")
        assert heard["a"].token_ids == expected_output([1], StopRules(6))


async def test_a_cancellation_that_says_which_request_it_means_ends_no_other_of_its_id(memory: MemoryBus) -> None:
    """However late it comes: not the one that runs, and not one that is written before it and read after it. The one that
    is meant ends, though its record should come after the wish."""
    meant, other = Timestamp(seconds=1), Timestamp(seconds=2)
    async with answers(memory) as heard, engine(memory) as running:
        running.runner.hold()
        await publish(memory, request("runs", [1], accepted_at=other))
        await until(lambda: running.num_open() == 1)
        await publish(memory, request("unread", [1], accepted_at=other), partition=9)
        for request_id in ("runs", "unread", "late"):
            await cancel(memory, request_id, accepted_at=meant)
        await cancel(memory, "heard")
        await until(lambda: running.engine.intake._cancels.mean("heard", None, accepted_at=None, written_ms=0))
        running.runner.allow()
        await heard.finished("runs", "unread")
        assert heard["runs"].token_ids == heard["unread"].token_ids == expected([1])

        await until_next_millisecond()
        await publish(memory, request("late", [1], accepted_at=meant))
        await heard.finished("late")
        assert heard["late"].token_ids == []


async def test_a_request_whose_id_runs_is_refused(memory: MemoryBus) -> None:
    """A second record with the id of a request that runs is answered, where it asks for it, with ALREADY_EXISTS, and
    committed; the request that runs is not disturbed, and its record is still passed over when it comes again."""
    async with answers(memory) as heard, answers(memory, reply=6) as other, engine(memory) as running:
        running.runner.hold()
        await publish(memory, request("a", [1, 2], max_tokens=30, ignore_eos=True))
        await until(lambda: running.num_open() == 1)
        await publish(memory, request("a", [7], num_choices=2, reply_partition=6), partition=9)
        await other.finished(("a", 0), ("a", 1))
        for choice in (0, 1):
            finish = other["a", choice].finish
            assert finish is not None
            assert finish.error.code == code_pb2.ALREADY_EXISTS
            assert "id a " in finish.error.message
        assert {record.source.partition for record in other.records} == {9}
        async with engine(memory, name="second"):
            running.runner.allow()
            await heard.finished("a")
        assert heard["a"].token_ids == expected_output([1, 2], StopRules(30))
        assert heard.num_repeated == 0
    lag = await memory.lag(GROUP, [topics.REQUESTS_INTERACTIVE])
    for partition in (2, 9):
        assert lag[topics.REQUESTS_INTERACTIVE.partition(partition)].committed == Position(1)


async def test_redelivery_to_the_same_engine_does_not_answer_twice(memory: MemoryBus) -> None:
    """A second engine joins while requests run; what stays with the first is delivered to it again, and passed over."""
    async with answers(memory) as heard, engine(memory, name="first") as first:
        first.runner.hold()
        prompts = {f"r{partition}": [partition % 20 + 1] for partition in (0, 8, 16, 24)}
        for request_id, prompt_ids in prompts.items():
            partition = int(request_id[1:])
            await publish(memory, request(request_id, prompt_ids, max_tokens=30), partition=partition)
        await until(lambda: first.num_open() == 4)
        async with engine(memory, name="second"):
            first.runner.allow()
            await heard.finished(*prompts)
        assert heard.num_repeated == 0
        for request_id, prompt_ids in prompts.items():
            assert heard[request_id].token_ids == expected(prompt_ids, max_tokens=30)
        assert {record.engine for record in heard.records} == {"first", "second"}


async def test_what_is_lost_is_dropped_and_answered_by_the_next_owner(open_bus: OpenBus) -> None:
    """An engine stops in the middle of an answer; another begins it again, and the reader gets each token once."""
    async with open_bus() as bus:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard:
            async with open_bus() as own, engine(own, name="first", drain_seconds=0) as first:
                first.runner.hold()
                first.runner.allow(3)
                await publish(bus, request("a", [1, 2], max_tokens=150, ignore_eos=True))
                await heard.until(lambda: len(heard["a"].token_ids) == 3)
            assert heard["a"].finish is None
            async with open_bus() as own, engine(own, name="second"):
                await heard.finished("a")
        assert heard["a"].token_ids == expected_output([1, 2], StopRules(150))
        assert {record.engine for record in heard.records} == {"first", "second"}


async def test_a_member_that_was_thrown_out_begins_again(memory: MemoryBus) -> None:
    """It drops what it had, though it gets the same partitions again, and answers anew under a higher epoch."""
    async with answers(memory) as heard, engine(memory) as running:
        running.runner.hold()
        running.runner.allow(3)
        await publish(memory, request("a", [1, 2], max_tokens=190, ignore_eos=True))
        await heard.until(lambda: len(heard["a"].token_ids) == 3)
        first = running.engine.requests.running("a")
        (member,) = memory.members(GROUP)
        with memory.frozen(member):
            pass
        await until(lambda: running.engine.requests.running("a") not in (first, None))
        running.runner.allow()
        await heard.finished("a")
        assert heard["a"].token_ids == expected_output([1, 2], StopRules(190))
        epochs = [record.epoch for record in heard.records]
        assert epochs == sorted(epochs)
        assert len(set(epochs)) == 2
        await running.until_idle()


async def test_a_drained_engine_takes_nothing_more_and_leaves_its_groups(memory: MemoryBus) -> None:
    """Draining answers what was taken, leaves what was not, and lets other engines have the partitions."""
    async with answers(memory) as heard, engine(memory) as running:
        running.runner.hold()
        await publish(memory, request("taken", [1], max_tokens=3))
        await until(lambda: running.num_open() == 1)
        async with asyncio.TaskGroup() as tasks:
            draining = tasks.create_task(running.engine.intake.drain())
            await until(lambda: running.engine.intake.is_draining)
            await publish(memory, request("left", [1], max_tokens=3))
            running.runner.allow()
            await draining
        await heard.finished("taken")
        assert heard["left"].finish is None
        assert memory.members(GROUP) == []
        async with engine(memory):
            await heard.finished("left")
        await running.engine.intake.drain()


async def test_an_engine_that_cannot_compute_fails(memory: MemoryBus) -> None:
    """What the step thread dies of ends the service, named; the request stays in the log for another engine."""

    def launch(step: Step) -> Launched:
        raise MemoryError("out of device memory")

    async with answers(memory) as heard:
        with pytest.raises(ExceptionGroup) as raised:
            async with engine(memory) as running:
                running.runner.launch = launch  # type: ignore[method-assign]
                await publish(memory, request("a", [1]))
                await heard.finished("a")
        failures = raised.value.subgroup(InternalError)
        assert failures is not None
        assert "out of device memory" in str(failures.exceptions[0])
        async with engine(memory):
            await heard.finished("a")
