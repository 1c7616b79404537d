"""Streams that go on from a cursor: at another gateway, after the first one is gone, beside it, from the beginning."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from holdfast import rpc
from holdfast.bus import MAX_RECORD_BYTES
from holdfast.errors import HoldfastError, InvalidRequest, NotFound, StreamFailed, from_rpc_error
from holdfast.events import Accepted, Event, Finished, FinishReason, Resumed, Tokens, Usage, event_from_wire
from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.topics import REQUESTS, TOKENS
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc, generation_pb2
from services.gateway.choice import Mark
from tests.conftest import OpenBus
from tests.gateway.doubles import (
    CURSORS,
    EOS,
    LENGTH,
    STOP,
    Face,
    ids,
    two_gateways,
)


@asynccontextmanager
async def resumed(face: Face, cursor: str) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a stream from a cursor on, as the wire has them."""
    async with rpc.channel(face.addresses.grpc) as channel:
        stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
        async with rpc.streaming(stub.Resume(pb.ResumeRequest(cursor=cursor))) as call:

            async def events() -> AsyncIterator[Event]:
                try:
                    async for message in call:
                        yield event_from_wire(message)
                except grpc.RpcError as error:
                    raise from_rpc_error(error) from error

            yield events()


async def rest(face: Face, cursor: str) -> list[Event]:
    """All events from a cursor on."""
    async with resumed(face, cursor) as events:
        return [event async for event in events]


async def refused(face: Face, cursor: str) -> HoldfastError:
    with pytest.raises(HoldfastError) as caught:
        await rest(face, cursor)
    return caught.value


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


async def test_a_stream_goes_on_at_another_gateway_when_the_first_is_gone(open_bus: OpenBus) -> None:
    """What was written meanwhile comes from the log, what is written then as it comes; indices, usage and finish reason
    are those of the one stream."""
    async with two_gateways(open_bus) as mesh:
        async with mesh.first.client.generate("hi", resume=False, cancel_on_exit=False) as answer:
            accepted = await anext(answer)
            assert isinstance(accepted, Accepted)
            job = await mesh.engine.job()
            await mesh.engine.say(job, "one ")
            before = await anext(answer)
            assert isinstance(before, Tokens)
            await mesh.first.life.aclose()
        await mesh.engine.say(job, "two ")
        async with resumed(mesh.second, before.cursor) as events:
            assert await anext(events) == Resumed(
                of_client(job.request.request_id), before.cursor, 2, next_index=(4,), ended=()
            )
            meanwhile = await anext(events)
            assert isinstance(meanwhile, Tokens)
            assert (meanwhile.text, meanwhile.first_index) == ("two ", 4)
            await mesh.engine.say(job, "three")
            live = await anext(events)
            assert isinstance(live, Tokens)
            assert (live.text, live.first_index) == ("three", 8)
            await mesh.engine.say(job, [EOS], finish=STOP, cached=1)
            *_, end = [event async for event in events]
            assert isinstance(end, Finished)
            assert (end.reason, end.usage) == (FinishReason.STOP, Usage(2, 1, 14))


async def test_a_stream_can_be_read_from_every_event_on(open_bus: OpenBus) -> None:
    """However often, at both gateways, while it runs and when it has ended; from the end on nothing comes but the end."""
    async with two_gateways(open_bus) as mesh, mesh.first.client.generate("hi") as answer:
        seen: list[Event] = [await anext(answer)]
        job = await mesh.engine.job()
        for text in ("a", "b", "c"):
            await mesh.engine.say(job, text)
            seen.append(await anext(answer))
        async with resumed(mesh.first, seen[1].cursor) as beside:
            assert isinstance(await anext(beside), Resumed)
            await mesh.engine.say(job, "d", finish=LENGTH)
            assert text_of([event async for event in beside]) == "bcd"
        seen += [event async for event in answer]
        assert text_of(seen) == "abcd"
        for index, event in enumerate(seen):
            for face in (mesh.first, mesh.second):
                first, *more = await rest(face, event.cursor)
                assert isinstance(first, Resumed)
                assert text_of(more) == text_of(seen[index + 1 :])
                assert more[-1:] == seen[index + 1 :][-1:]
        assert await rest(mesh.second, seen[-1].cursor) == [
            Resumed(of_client(job.request.request_id), seen[-1].cursor, 2, next_index=(4,), ended=(0,))
        ]


async def test_the_text_goes_on_within_a_character_and_a_stop_string(open_bus: OpenBus) -> None:
    """The bytes of an unfinished character and the beginning of a stop string, both told of before, come exactly once."""
    async with two_gateways(open_bus) as mesh:
        async with mesh.first.client.generate("hi", stop=["END"], resume=False, cancel_on_exit=False) as answer:
            await anext(answer)
            job = await mesh.engine.job()
            await mesh.engine.say(job, list(b"aEN" + "€".encode()[:2]))
            before = await anext(answer)
            while CURSORS.decode(before.cursor).places[0].prefix.count < 3:  # with a stop string, token by token
                before = await anext(answer)
            await mesh.first.life.aclose()
        await mesh.engine.say(job, list("€".encode()[2:] + b"bEN"))
        async with resumed(mesh.second, before.cursor) as events:
            await anext(events)
            text = ""
            while text != "EN€b":
                text += text_of([await anext(events)])
            await mesh.engine.say(job, "Dmore")
            end = [event async for event in events][-1]
            assert isinstance(end, Finished)
            assert (end.reason, end.stop, end.usage) == (FinishReason.STOP, "END", Usage(2, 0, 10))
            cancelled = await mesh.engine.cancelled()
            assert (cancelled.request_id, cancelled.choice) == (job.request.request_id, 0)


async def test_what_was_asked_for_holds_after_resuming(open_bus: OpenBus) -> None:
    """Token ids, log-probabilities and special tokens come as before."""
    options = {"return_token_ids": True, "show_special_tokens": True, "logprobs": 1}
    async with two_gateways(open_bus) as mesh, mesh.first.client.generate("hi", **options) as answer:  # type: ignore[arg-type]
        accepted = await anext(answer)
        job = await mesh.engine.job()
        top = [generation_pb2.TopLogprob(token_id=66, logprob=-0.25)]
        logprobs = [generation_pb2.TokenLogprobs(logprob=-0.5, top=top)] * 2
        await mesh.engine.say(job, [65, EOS], logprobs=logprobs, finish=LENGTH)
        there = [event async for event in answer]
        _, *here = await rest(mesh.second, accepted.cursor)
        assert here == there
        assert isinstance(here[0], Tokens)
        assert (here[0].token_ids, here[0].text, len(here[0].logprobs)) == ((65, EOS), "A<eos>", 2)


async def test_a_zombie_that_woke_before_the_reader_came_is_ignored(open_bus: OpenBus) -> None:
    """The cursor knows the epoch: what an earlier owner writes after a marker that the reader never saw counts for
    nothing, in the log as it lies and as it grows."""
    async with two_gateways(open_bus) as mesh, mesh.first.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "a", epoch=7)
        before = await anext(answer)
        stale = mesh.engine.part(job, ids("X"))
        job.written[0] = CURSORS.decode(before.cursor).places[0].prefix
        await mesh.engine.write(job, stale, epoch=6)
        async with resumed(mesh.second, before.cursor) as events:
            await anext(events)
            await mesh.engine.say(job, "b", epoch=7)
            assert text_of([await anext(events)]) == "b"
            await mesh.engine.write(job, stale, epoch=6)
            await mesh.engine.say(job, "c", epoch=7, finish=LENGTH)
            assert text_of([event async for event in events]) == "c"


async def test_choices_that_ended_before_stay_ended(open_bus: OpenBus) -> None:
    """Of several choices each goes on, or not, from where it was."""
    async with two_gateways(open_bus) as mesh:
        async with mesh.first.client.generate("hi", num_choices=3, resume=False, cancel_on_exit=False) as answer:
            await anext(answer)
            job = await mesh.engine.job()
            await mesh.engine.say(job, "a", choice=0, finish=LENGTH)
            seen = [await anext(answer), await anext(answer)]
            await mesh.engine.say(job, "bb", choice=1)
            seen.append(await anext(answer))
            await mesh.first.life.aclose()
        await mesh.engine.write(
            job,
            mesh.engine.part(job, ids("B"), choice=1, finish=LENGTH),
            mesh.engine.part(job, ids("C"), choice=2, finish=LENGTH),
        )
        first, *more = await rest(mesh.second, seen[-1].cursor)
        assert isinstance(first, Resumed)
        assert (first.next_index, first.ended) == ((1, 2, 0), (0,))
        texts = {event.choice: event.text for event in more if isinstance(event, Tokens)}
        assert texts == {1: "B", 2: "C"}
        assert sorted(event.choice for event in more if isinstance(event, Finished)) == [1, 2]


async def test_a_long_stream_is_read_as_fast_as_its_client_takes_it(open_bus: OpenBus) -> None:
    """Far more than may wait for a client lies in the log, and all of it comes."""
    async with two_gateways(open_bus, max_buffered_tokens=512) as mesh:
        submitted = await mesh.first.client.submit("hi")
        job = await mesh.engine.job()
        for number in range(100):
            await mesh.engine.say(job, f"{number:3} " * 25, finish=LENGTH if number == 99 else None)
        events = await rest(mesh.second, submitted.cursor)
        assert text_of(events) == "".join(f"{number:3} " * 25 for number in range(100))


async def test_a_submitted_request_has_a_result(open_bus: OpenBus) -> None:
    """At any gateway: awaited whole, or what there is after a while; asking cancels nothing."""
    async with two_gateways(open_bus) as mesh:
        submitted = await mesh.first.client.submit("hi", num_choices=2, return_token_ids=True)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "a", finish=LENGTH)
        soon = await mesh.second.client.result(submitted.cursor, wait=0.5)
        assert (soon.request_id, soon.prompt_tokens, soon.complete) == (submitted.request_id, 2, False)
        assert [(choice.text, choice.finished is None) for choice in soon.choices] == [("a", False), ("", True)]
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(mesh.second.client.result(submitted.cursor))
            await mesh.engine.say(job, "bc", choice=1, finish=LENGTH, cached=1)
        whole = waiting.result()
        assert whole.complete
        assert (whole.choices[1].text, whole.choices[1].token_ids) == ("bc", (98, 99))
        assert whole.choices[1].finished is not None
        assert whole.choices[1].finished.usage == Usage(2, 1, 2)
        with pytest.raises(InvalidRequest, match="cursor of its start|one of its start"):
            await mesh.second.client.result(whole.choices[1].finished.cursor)
        with pytest.raises(InvalidRequest, match="wait must be above 0"):
            await mesh.second.client.result(submitted.cursor, wait=0)
        await mesh.first.client.cancel("a-probe")
        assert of_client((await mesh.engine.cancelled()).request_id) == "a-probe", "nobody was cancelled before"


async def test_leaving_a_resumed_stream_cancels_where_the_request_said_so(open_bus: OpenBus) -> None:
    """And not otherwise."""
    async with two_gateways(open_bus) as mesh:
        for asked in (False, True):
            async with mesh.first.client.generate("hi", resume=False, cancel_on_exit=asked) as answer:
                accepted = await anext(answer)
                job = await mesh.engine.job()
                async with resumed(mesh.second, accepted.cursor) as events:
                    await anext(events)
                if asked:
                    assert of_client((await mesh.engine.cancelled()).request_id) == of_client(job.request.request_id)
                await mesh.engine.say(job, "x", finish=LENGTH)
                await answer.read()
        await mesh.first.client.cancel("a-probe")
        assert of_client((await mesh.engine.cancelled()).request_id) == "a-probe"


async def test_an_error_of_the_engine_comes_after_resuming_too(open_bus: OpenBus) -> None:
    """A stream that failed fails for whoever reads it."""
    async with two_gateways(open_bus) as mesh:
        submitted = await mesh.first.client.submit("hi")
        job = await mesh.engine.job()
        part = mesh.engine.part(job, ids("so far"), finish=generation_pb2.FINISH_REASON_ERROR)
        part.finish.error.CopyFrom(generation_pb2.StreamError(code=10, message="the engine has no memory left"))
        await mesh.engine.write(job, part)
        error = await refused(mesh.second, submitted.cursor)
        assert isinstance(error, StreamFailed)
        assert "no memory left" in str(error)


async def test_a_cursor_of_another_mesh_is_refused(open_bus: OpenBus) -> None:
    """A gateway with another key does not open the stream."""
    async with two_gateways(open_bus, second_key="the key of another mesh") as mesh:
        submitted = await mesh.first.client.submit("hi")
        error = await refused(mesh.second, submitted.cursor)
        assert isinstance(error, InvalidRequest)
        assert error.field == "cursor"


async def test_a_cursor_beyond_the_log_is_refused(open_bus: OpenBus) -> None:
    """Where the log was made anew, or holds another request, the stream is not there."""
    async with two_gateways(open_bus) as mesh:
        one, other = [await mesh.first.client.submit("hi") for _ in range(2)]
        start, elsewhere = CURSORS.decode(one.cursor), CURSORS.decode(other.cursor)
        beyond = CURSORS.encoder(start)(Mark(1000, 0), start.places)
        swapped = CURSORS.encode(
            type(start)("another", start.source, start.request_offset, 3, elsewhere.mark, start.places)
        )
        topic, partition = REQUESTS[start.source.request_class], start.source.partition  # type: ignore[index]
        end = (await mesh.bus.kept(topic.partition(partition))).stop
        lost = CURSORS.encode(replace(start, request_offset=end))
        for cursor, why in ((beyond, "does not reach"), (lost, "does not reach"), (swapped, "another request")):
            error = await refused(mesh.second, cursor)
            assert isinstance(error, NotFound)
            assert why in str(error)


async def test_a_cursor_whose_tokens_are_not_kept_any_more_is_refused() -> None:
    """It says for how long they are; the stream itself is read on by whoever kept up with it."""
    bound = MAX_RECORD_BYTES
    async with (
        MemoryBus(max_topic_bytes=bound) as bus,
        two_gateways(lambda: contextlib.nullcontext(bus)) as mesh,
        mesh.first.client.generate("hi") as answer,
    ):
        accepted = await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "x")
        await anext(answer)
        large = generation_pb2.TokenBatch(engine="x" * (bound - 1000)).SerializeToString()
        await bus.publish(TOKENS.partition(job.request.reply_partition), large)
        await mesh.engine.say(job, "y")
        last = await anext(answer)
        error = await refused(mesh.second, accepted.cursor)
        assert isinstance(error, NotFound)
        assert "no longer holds the stream" in str(error)
        assert "6 hours" in str(error)
        await mesh.engine.say(job, "end", finish=LENGTH)
        assert text_of(await rest(mesh.second, last.cursor)) == "end"
        assert await answer.read() == "end"
