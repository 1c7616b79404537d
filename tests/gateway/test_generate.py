"""A request's life in the gateway, over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from holdfast import rpc
from holdfast.accept import Prefix, extend_hash
from holdfast.bus import Headers, TopicPartition
from holdfast.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    NotAccepted,
    Overloaded,
    RequestTooLarge,
    StreamFailed,
    Unavailable,
    from_rpc_error,
)
from holdfast.events import Accepted, Event, Finished, FinishReason, Resumed, TokenLogprobs, Tokens, TopLogprob, Usage
from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.topics import REQUESTS_BATCH, REQUESTS_INTERACTIVE, TOKENS
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc, generation_pb2
from services.gateway.choice import Mark, Place
from services.gateway.settings import GatewaySettings
from services.gateway.submissions import Submissions
from tests.gateway.doubles import CONTEXT, CURSORS, EOS, LENGTH, MODEL, STOP, ByteTokenizer, Job, Mesh, ids, open_mesh

CANCELLED = generation_pb2.FINISH_REASON_CANCELLED
ERROR = generation_pb2.FINISH_REASON_ERROR

Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]


@asynccontextmanager
async def call(mesh: Mesh, request: pb.GenerateRequest, **options: object) -> AsyncIterator[Call]:
    """A call that was accepted."""
    async with rpc.streaming(mesh.stub.Generate(request, **options)) as stream:  # type: ignore[arg-type]
        assert (await anext(aiter(stream))).HasField("accepted")
        yield stream


async def nobody_was_cancelled(mesh: Mesh) -> None:
    """The next cancellation in the log is one that is asked for here."""
    await mesh.client.cancel("a-probe")
    assert of_client((await mesh.engine.cancelled()).request_id) == "a-probe"


async def test_a_request_is_accepted_streamed_and_finished() -> None:
    """Accepted, then the tokens as they come, then the end with what it cost."""
    async with open_mesh() as mesh, mesh.client.generate("hi", request_id="r-1") as answer:
        accepted = await anext(answer)
        assert isinstance(accepted, Accepted)
        assert (accepted.request_id, accepted.prompt_tokens) == ("r-1", 2)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "Good ")
        first = await anext(answer)
        await mesh.engine.say(job, [*ids("day"), EOS], finish=STOP, cached=1)
        second, end = [event async for event in answer]
        assert isinstance(first, Tokens)
        assert isinstance(second, Tokens)
        assert (first.text, first.first_index, second.text, second.first_index, second.num_tokens) == (
            "Good ",
            0,
            "day",
            5,
            4,
        )
        assert isinstance(end, Finished)
        assert (end.reason, end.usage) == (FinishReason.STOP, Usage(2, 1, 9))


async def test_the_log_has_all_that_an_engine_needs() -> None:
    """The record holds the prompt's ids, the rules as asked, a drawn seed, the deadline, and where to answer."""
    async with open_mesh(reply_partition=5) as mesh:
        await mesh.bus.publish(TOKENS.partition(5), generation_pb2.TokenBatch().SerializeToString())
        await mesh.client.models()  # the gateway has read the record by the time it answers
        before = time.time()
        submitted = await mesh.client.submit(
            "hi",
            request_id="r-1",
            temperature=0.5,
            max_tokens=7,
            stop=["x"],
            num_choices=3,
            timeout=9,
            request_class="batch",
        )
        job = await mesh.engine.job()
        record = job.request
        assert job.record.topic == REQUESTS_BATCH.name
        assert job.record.key == b"r-1"
        assert (of_client(record.request_id), record.model, record.num_choices) == ("r-1", MODEL, 3)
        assert record.request_class == generation_pb2.REQUEST_CLASS_BATCH
        assert list(record.prompt_token_ids) == ids("hi")
        assert (record.sampling.temperature, record.sampling.HasField("seed")) == (0.5, True)
        assert (record.stop.max_tokens, list(record.stop.stop)) == (7, ["x"])
        accepted_at = record.accepted_at.ToNanoseconds() / 1e9
        assert before <= accepted_at <= time.time()
        assert record.deadline.ToNanoseconds() / 1e9 == pytest.approx(accepted_at + 9, abs=1e-3)
        assert (record.reply_partition, record.reply_start_offset) == (5, 1)
        start = CURSORS.decode(submitted.cursor)
        assert (start.mark, start.reply_partition, start.request_offset) == (Mark(1, 0), 5, job.record.offset)
        assert start.places == (Place.at_start(ids("hi")),) * 3
        assert start.source == (record.request_class, job.record.partition)


async def test_a_request_says_the_highest_epoch_that_its_gateway_had_met() -> None:
    """That of its own source partition; 0 where there was none."""
    batch = generation_pb2.REQUEST_CLASS_BATCH
    async with open_mesh() as mesh:
        await mesh.client.submit("hi", request_class="batch")
        assert (await mesh.engine.job()).request.reply_start_epoch == 0
        for epoch in (200, 100):
            for source in REQUESTS_BATCH.partitions:
                marker = generation_pb2.TokenBatch(epoch=epoch + source.partition)
                marker.source.request_class, marker.source.partition = batch, source.partition
                await mesh.bus.publish(TOKENS.partition(0), marker.SerializeToString())
        await mesh.client.models()  # the gateway has read the records by the time it answers
        await mesh.client.submit("hi", request_class="batch")
        job = await mesh.engine.job()
        assert job.request.reply_start_epoch == 200 + job.record.partition
        assert job.request.reply_start_offset == 2 * REQUESTS_BATCH.num_partitions


async def test_what_the_client_leaves_open_is_as_the_models_makers_say() -> None:
    """A field that the request has counts, also one that is 0; the makers' top_k is got rid of by 0."""
    makers = generation_pb2.SamplingParams(temperature=0.25, top_p=0.5, top_k=20)
    async with open_mesh(tokenizer=ByteTokenizer(sampling=makers)) as mesh:
        await mesh.client.submit("hi", presence_penalty=1.0)
        left_open = (await mesh.engine.job()).request.sampling
        await mesh.client.submit("hi", temperature=0.0, top_k=0)
        given = (await mesh.engine.job()).request.sampling
    assert (left_open.temperature, left_open.top_p, left_open.top_k) == (0.25, 0.5, 20)
    assert (left_open.presence_penalty, left_open.HasField("min_p")) == (1.0, False)
    assert (given.temperature, given.HasField("temperature"), given.top_p) == (0.0, True, 0.5)
    assert not given.HasField("top_k")


async def test_what_the_client_leaves_open_is_drawn() -> None:
    """Two requests without id and seed get ids and seeds of their own, and go to different partitions."""
    async with open_mesh() as mesh:
        seen = []
        for _ in range(2):
            await mesh.stub.Submit(pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi")))
            seen.append(await mesh.engine.job())
        one, two = seen
        assert of_client(one.request.request_id) != of_client(two.request.request_id)
        assert one.request.sampling.seed != two.request.sampling.seed
        assert one.record.partition != two.record.partition
        assert one.record.topic == REQUESTS_INTERACTIVE.name
        assert not one.request.HasField("deadline")


async def test_every_kind_of_input_becomes_ids() -> None:
    """A prompt, a conversation and token ids reach the engine as ids."""
    async with open_mesh() as mesh:
        await mesh.client.submit("hi")
        assert list((await mesh.engine.job()).request.prompt_token_ids) == ids("hi")
        await mesh.client.submit(token_ids=[1, 2, 257])
        assert list((await mesh.engine.job()).request.prompt_token_ids) == [1, 2, 257]
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Good"}]
        await mesh.client.submit(messages=messages, template_args={"a": 1}, continue_final_message=True)
        prompt = bytes((await mesh.engine.job()).request.prompt_token_ids)
        assert prompt == b'{"a": 1}\nuser: hi\nassistant: Good'


async def test_choices_stream_side_by_side() -> None:
    """Each of n choices has its own tokens, indices and end."""
    async with open_mesh() as mesh, mesh.client.generate("hi", num_choices=2) as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.write(job, mesh.engine.part(job, ids("a1")), mesh.engine.part(job, ids("b1"), choice=1))
        await mesh.engine.say(job, "b2", choice=1, finish=LENGTH)
        await mesh.engine.say(job, "a2", finish=LENGTH)
        texts, ends = {0: "", 1: ""}, []
        async for event in answer:
            if isinstance(event, Tokens):
                texts[event.choice] += event.text
            elif isinstance(event, Finished):
                ends.append(event.choice)
        assert (texts, sorted(ends)) == ({0: "a1a2", 1: "b1b2"}, [0, 1])


async def test_log_probabilities_come_where_they_are_asked_for() -> None:
    """Each token has its log-probability and the likeliest ones."""
    async with open_mesh() as mesh, mesh.client.generate("hi", logprobs=1) as answer:
        await anext(answer)
        job = await mesh.engine.job()
        top = [generation_pb2.TopLogprob(token_id=66, logprob=-0.25)]
        await mesh.engine.say(job, "A", logprobs=[generation_pb2.TokenLogprobs(logprob=-0.5, top=top)])
        tokens = await anext(answer)
        assert isinstance(tokens, Tokens)
        assert tokens.logprobs == (TokenLogprobs(-0.5, (TopLogprob(66, -0.25),)),)


async def test_special_tokens_are_shown_where_asked() -> None:
    """Special tokens other than the stop token have text only where it was asked for."""
    async with open_mesh() as mesh:
        for shown, text in ((False, "ab"), (True, "a<eos>b")):
            async with mesh.client.generate("hi", show_special_tokens=shown) as answer:
                await anext(answer)
                await mesh.engine.say(await mesh.engine.job(), [97, EOS, 98, EOS], finish=STOP)
                assert await answer.read() == text


async def test_an_id_that_is_open_here_is_taken() -> None:
    """A second request of an open id is refused with ALREADY_EXISTS; after the end the id is free."""
    async with open_mesh() as mesh:
        async with mesh.client.generate("hi", request_id="r-1") as answer:
            await anext(answer)
            with pytest.raises(AlreadyExists, match="r-1"):
                await mesh.client.submit("hi", request_id="r-1")
            await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
            assert await answer.read() == "x"
        await mesh.client.submit("hi", request_id="r-1")


async def test_the_timeout_ends_the_request_with_deadline() -> None:
    """When the timeout passes, though no engine should know, open choices finish with DEADLINE, and the log is told."""
    async with open_mesh() as mesh, mesh.client.generate("hi", timeout=2, request_id="r-1") as answer:
        await anext(answer)
        await mesh.engine.say(await mesh.engine.job(), "so far")
        tokens, end = [event async for event in answer]
        assert isinstance(tokens, Tokens)
        assert isinstance(end, Finished)
        assert (tokens.text, end.reason, end.usage.completion_tokens) == ("so far", FinishReason.DEADLINE, 6)
        cancel = await mesh.engine.cancelled()
        assert (of_client(cancel.request_id), cancel.HasField("choice"), cancel.reason) == (
            "r-1",
            False,
            "its deadline passed",
        )


async def test_an_engines_deadline_is_a_finish_too() -> None:
    """DEADLINE from the engine reaches the client as it is."""
    async with open_mesh() as mesh, mesh.client.generate("hi", timeout=60) as answer:
        await anext(answer)
        await mesh.engine.say(await mesh.engine.job(), finish=generation_pb2.FINISH_REASON_DEADLINE)
        end = await anext(answer)
        assert isinstance(end, Finished)
        assert end.reason is FinishReason.DEADLINE


async def test_the_calls_deadline_is_the_requests_where_it_has_no_timeout() -> None:
    """Without a timeout the request's deadline is that of the call; with one it is not."""
    async with open_mesh() as mesh:
        async with call(mesh, pb.GenerateRequest(prompt="hi"), timeout=30):
            record = (await mesh.engine.job()).request
            assert 29 < record.deadline.ToNanoseconds() / 1e9 - time.time() < 30.5
        request = pb.GenerateRequest(prompt="hi", timeout=Duration(seconds=50))
        async with call(mesh, request, timeout=30):
            record = (await mesh.engine.job()).request
            assert 49 < record.deadline.ToNanoseconds() / 1e9 - time.time() < 50.5


async def test_a_call_that_may_last_for_ever_is_given_the_longest_time_there_is() -> None:
    """A deadline in centuries is how some clients say that they have none."""
    async with open_mesh() as mesh, call(mesh, pb.GenerateRequest(prompt="hi"), timeout=1e8):
        record = (await mesh.engine.job()).request
        longest = GatewaySettings().max_timeout_seconds
        assert longest - 60 < record.deadline.ToNanoseconds() / 1e9 - time.time() <= longest


async def test_tokens_of_another_request_with_the_same_id_are_not_taken() -> None:
    """What an engine still writes for an earlier request of the id comes from another source partition."""
    async with open_mesh() as mesh, mesh.client.generate("hi", request_id="r-1") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        elsewhere = dataclasses.replace(job.record, partition=(job.record.partition + 1) % 32)
        await mesh.engine.say(Job(job.request, elsewhere), "stale", finish=generation_pb2.FINISH_REASON_CANCELLED)
        await mesh.engine.say(job, "fresh", finish=LENGTH)
        assert await answer.read() == "fresh"


async def test_a_deadline_before_acceptance_is_an_error() -> None:
    """Where the time is over before the log has the request the call fails with DEADLINE_EXCEEDED; nothing runs."""
    tokenizer = ByteTokenizer()
    async with open_mesh(tokenizer=tokenizer) as mesh:
        tokenizer.open.clear()
        with pytest.raises(DeadlineExceeded, match="^the request's timeout passed before its answer was complete$"):
            await mesh.client.submit("hi", timeout=0.1)
        tokenizer.open.set()
        await mesh.client.submit("hi", request_id="next")
        assert of_client((await mesh.engine.job()).request.request_id) == "next"


async def test_a_tokenizer_that_does_not_answer_is_unavailable() -> None:
    """A request without a deadline does not wait for ever for its ids."""
    tokenizer = ByteTokenizer()
    async with open_mesh(tokenizer=tokenizer, tokenize_seconds=0.1) as mesh:
        tokenizer.open.clear()
        with pytest.raises(Unavailable, match=r"within 0\.1 seconds"):
            await mesh.client.submit("hi")


async def test_a_tokenizer_that_is_gone_is_named_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it listens, and what gRPC says of sockets, is for nobody outside. Nothing was accepted, and the client is told
    so: the library asks again."""
    monkeypatch.setattr("services.gateway.tokenizer.RETURN_SECONDS", 0.0)
    async with open_mesh() as mesh:
        await mesh.tokenizer_life.aclose()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.stub.Submit(pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi")))
        error = from_rpc_error(caught.value)
        assert isinstance(error, NotAccepted)
        assert str(error) == "the tokenizer does not answer"


async def test_cancel_reaches_the_log_and_the_engines_word_the_client() -> None:
    """Cancel returns when the log has the wish; the stream ends with CANCELLED once the engine says so."""
    async with open_mesh() as mesh, mesh.client.generate("hi", request_id="r-1") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.client.cancel("r-1")
        cancel = await mesh.engine.cancelled()
        assert (of_client(cancel.request_id), cancel.HasField("choice")) == ("r-1", False)
        await mesh.engine.say(job, finish=CANCELLED)
        end = await anext(answer)
        assert isinstance(end, Finished)
        assert end.reason is FinishReason.CANCELLED


async def test_what_is_no_id_cannot_be_cancelled() -> None:
    """Cancel refuses what no request can be called."""
    async with open_mesh() as mesh:
        with pytest.raises(InvalidRequest) as caught:
            await mesh.client.cancel("no such id")
        assert caught.value.field == "request_id"


@pytest.mark.parametrize("when", ["while tokenizing", "before the first token", "in the middle"])
async def test_a_client_that_leaves_ends_its_request_where_it_said_so(when: str) -> None:
    """With cancel_on_disconnect a call that ends early cancels the request at once, whatever it waits for."""
    tokenizer = ByteTokenizer()
    async with open_mesh(tokenizer=tokenizer) as mesh:
        request = pb.GenerateRequest(prompt="hi", request_id="r-1", cancel_on_disconnect=True)
        if when == "while tokenizing":
            tokenizer.open.clear()
            async with rpc.streaming(mesh.stub.Generate(request)) as stream, asyncio.TaskGroup() as group:
                reading = group.create_task(anext(aiter(stream), None))
                await tokenizer.asked.wait()
                reading.cancel()
            tokenizer.open.set()
            await mesh.client.submit("hi", request_id="next")
            assert of_client((await mesh.engine.job()).request.request_id) == "next", "it was never published"
            return
        async with call(mesh, request) as stream:
            job = await mesh.engine.job()
            if when == "in the middle":
                await mesh.engine.say(job, "a")
                await anext(aiter(stream))
        cancel = await mesh.engine.cancelled()
        assert (of_client(cancel.request_id), cancel.reason) == ("r-1", "the client left")


async def test_a_request_outlives_its_connection_where_nothing_else_was_said() -> None:
    """Without cancel_on_disconnect a dropped connection cancels nobody, and the id becomes free."""
    async with open_mesh() as mesh:
        async with call(mesh, pb.GenerateRequest(prompt="hi", request_id="r-1")):
            job = await mesh.engine.job()
        await mesh.engine.say(job, "nobody reads this", finish=LENGTH)
        await nobody_was_cancelled(mesh)
        await mesh.client.submit("hi", request_id="r-1")


async def test_a_stop_string_ends_its_choice_and_stops_its_engine() -> None:
    """The choice finishes with the text before the string, and the log is told that this choice is not needed."""
    async with open_mesh() as mesh, mesh.client.generate("hi", request_id="r-1", stop=["END"], num_choices=2) as answer:
        await anext(answer)
        job = await mesh.engine.job()
        for piece in ("one E", "N", "D two"):
            await mesh.engine.say(job, piece, choice=1)
        cancel = await mesh.engine.cancelled()
        assert (of_client(cancel.request_id), cancel.choice, cancel.HasField("choice")) == ("r-1", 1, True)
        await mesh.engine.say(job, "other", finish=LENGTH)
        await mesh.engine.say(job, choice=1, finish=CANCELLED)
        events = [event async for event in answer]
        ends = {event.choice: event for event in events if isinstance(event, Finished)}
        assert text_of(events, choice=1) == "one "
        assert (ends[1].reason, ends[1].stop, ends[1].usage.completion_tokens) == (FinishReason.STOP, "END", 7)
        assert (text_of(events, choice=0), ends[0].reason) == ("other", FinishReason.LENGTH)


def text_of(events: list[Event], *, choice: int) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens) and event.choice == choice)


@asynccontextmanager
async def unread_flood(mesh: Mesh) -> AsyncIterator[tuple[AsyncIterator[pb.GenerateResponse], Job]]:
    """The stream of an accepted request r-1, over a connection that holds little, and its job, of which more is written
    than is ever under way before anybody reads on."""
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    async with grpc.aio.insecure_channel(mesh.addresses.grpc, options=small_window) as channel:
        stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
        request = pb.GenerateRequest(prompt="hi", request_id="r-1", cancel_on_disconnect=True)
        async with rpc.streaming(stub.Generate(request)) as stream:
            assert (await anext(aiter(stream))).HasField("accepted")
            job = await mesh.engine.job()
            for _ in range(1500):
                await mesh.engine.say(job, "x" * 200)
            yield stream, job


async def test_a_client_that_reads_slowly_gets_it_all_from_the_log() -> None:
    """However much waits for it, little of that waits here; every token comes once, and the stream is caught up with."""
    async with open_mesh(max_buffered_tokens=512) as mesh, unread_flood(mesh) as (stream, job):
        num_tokens, most = 0, 0
        async for response in stream:
            assert response.HasField("finished") or response.tokens.first_index == num_tokens
            num_tokens += response.tokens.num_tokens
            most = max(most, response.tokens.num_tokens)
            if num_tokens == job.written[0].count == 1500 * 200:
                await mesh.engine.say(job, "the end", finish=LENGTH)
        assert num_tokens == job.written[0].count
        assert most <= 512 + 64 * 200, "what is taken off the log at once, beyond what may wait"
        await nobody_was_cancelled(mesh)


async def test_a_client_that_stops_reading_gives_its_place_back() -> None:
    """A message that is not read within write_seconds ends the call, long before too much waits: its place is free for
    others, its request is cancelled, and the client learns why if it reads on."""
    async with (
        open_mesh(max_buffered_tokens=1 << 20, max_streams=1, write_seconds=0.5) as mesh,
        unread_flood(mesh) as (stream, _),
    ):
        assert (await mesh.engine.cancelled()).reason == "the client left"
        await mesh.client.submit("hi", request_id="next")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
    assert isinstance(from_rpc_error(caught.value), Overloaded)
    assert "unread for 0.5 seconds" in str(from_rpc_error(caught.value))


async def test_an_engines_error_is_the_calls_status() -> None:
    """Where the engine fails a request the call ends with its code and message, and its other choices are cancelled."""
    async with open_mesh() as mesh, mesh.client.generate("hi", num_choices=2) as answer:
        await anext(answer)
        job = await mesh.engine.job()
        part = mesh.engine.part(job, ())
        part.finish.reason = ERROR
        part.finish.error.code, part.finish.error.message = 3, "max_model_len is 4"
        await mesh.engine.write(job, part)
        with pytest.raises(InvalidRequest, match="max_model_len is 4"):
            await anext(answer)
        assert of_client((await mesh.engine.cancelled()).request_id) == answer.request_id


async def test_an_unknown_reason_is_a_failure() -> None:
    """A finish reason of a newer engine is not taken for an end."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        part = mesh.engine.part(job, ())
        part.finish.SetInParent()
        await mesh.engine.write(job, part)
        with pytest.raises(StreamFailed, match="does not know"):
            await anext(answer)


async def test_a_token_that_the_tokenizer_does_not_have_fails_the_stream() -> None:
    """An id beyond the vocabulary is never sent to the tokenizer, where it would end the decoding of all streams."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        await mesh.engine.say(await mesh.engine.job(), [5000])
        with pytest.raises(StreamFailed, match="token 5000"):
            await anext(answer)


async def test_submit_returns_when_the_log_has_the_request() -> None:
    """A submitted request is in the log, its cursor at its start, and what its engine writes disturbs nobody."""
    async with open_mesh() as mesh:
        submitted = await mesh.client.submit("hi", request_id="r-1")
        job = await mesh.engine.job()
        assert (
            of_client(job.request.request_id)
            == submitted.request_id
            == of_client(CURSORS.decode(submitted.cursor).request_id)
            == "r-1"
        )
        await mesh.engine.say(job, "text", finish=LENGTH)
        await nobody_was_cancelled(mesh)


async def test_what_is_resumed_has_places_of_its_own() -> None:
    """A gateway that is full of new requests goes on with as many that were accepted before, and with no more."""
    async with open_mesh(max_streams=1) as mesh, mesh.client.generate("hi") as answer:
        cursor = (await anext(answer)).cursor
        async with mesh.client.resume(cursor) as beside:
            assert isinstance(await anext(beside), Resumed)
            with pytest.raises(Overloaded, match="1 resumed streams are open"):
                await mesh.client.result(cursor)
            with pytest.raises(Overloaded, match="1 requests are open"):
                await mesh.client.submit("hi")


async def test_a_request_that_is_submitted_again_is_the_same() -> None:
    """In the same words under the same id, at once or later, also when it has ended: one record in the log, one cursor."""
    async with open_mesh() as mesh:
        one, two = await asyncio.gather(*(mesh.client.submit("hi", request_id="r-1") for _ in range(2)))
        job = await mesh.engine.job()
        await mesh.engine.say(job, "x", finish=LENGTH)
        assert one == two == await mesh.client.submit("hi", request_id="r-1")
        with pytest.raises(AlreadyExists, match="the id r-1 was submitted, and it says something else"):
            await mesh.client.submit("ho", request_id="r-1")
        await mesh.client.submit("hi", request_id="r-2")
        assert of_client((await mesh.engine.job()).request.request_id) == "r-2"


async def test_submissions_are_forgotten_with_their_answers() -> None:
    """When the log keeps the tokens no longer, the same words under the same id are a new request."""
    now = 0.0
    submissions = Submissions(lambda: now)
    request = pb.GenerateRequest(request_id="nightly", prompt="hi")
    cursors = iter(["first", "second"])

    async def submit() -> Accepted:
        return Accepted("nightly", cursor=next(cursors), prompt_tokens=1)

    first = await submissions.once(request, submit)
    now = TOKENS.retention.total_seconds()
    assert await submissions.once(request, submit) == first
    now += 1
    assert (await submissions.once(request, submit)).cursor == "second"


async def test_leaving_one_answer_ends_no_other_of_its_id() -> None:
    """Of one id two requests run, which no gateway could know; a client that leaves says by its cursor which one it means."""
    async with open_mesh() as mesh:
        await mesh.client.submit("hi", request_id="mine")
        submitted = await mesh.engine.job()
        async with mesh.client.generate("hi", request_id="mine") as answer:
            await anext(answer)
            left = await mesh.engine.job()
        wish = await mesh.engine.cancelled()
        assert wish.request_id == left.request.request_id != submitted.request.request_id


async def test_a_cancellation_names_an_id_or_a_cursor() -> None:
    """By an id all requests of it are meant; both, or neither, are refused."""
    async with open_mesh() as mesh:
        cursor = (await mesh.client.submit("hi", request_id="mine")).cursor
        await mesh.client.cancel("mine")
        assert (await mesh.engine.cancelled()).request_id == "mine"
        await mesh.client.cancel(cursor=cursor)
        assert (await mesh.engine.cancelled()).request_id == (await mesh.engine.job()).request.request_id
        for both in ({"request_id": "mine", "cursor": cursor}, {}):
            with pytest.raises(InvalidRequest, match="either a request_id or a cursor"):
                await mesh.client.cancel(**both)


async def test_a_submission_that_was_refused_may_be_made_again() -> None:
    """Nothing of it is remembered."""
    async with open_mesh() as mesh:
        with pytest.raises(InvalidRequest):
            await mesh.client.submit(token_ids=[1 << 20], request_id="r-1")
        await mesh.client.submit("hi", request_id="r-1")
        assert of_client((await mesh.engine.job()).request.request_id) == "r-1"


async def test_a_submitted_request_has_no_connection() -> None:
    """Submit refuses cancel_on_disconnect; its call's deadline is not the request's."""
    async with open_mesh() as mesh:
        request = pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi", cancel_on_disconnect=True))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.stub.Submit(request)
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequest)
        assert error.field == "request.cancel_on_disconnect"
        await mesh.client.submit("hi")  # the client's calls have deadlines
        assert not (await mesh.engine.job()).request.HasField("deadline")


async def test_the_model_is_listed() -> None:
    """ListModels tells the tokenizer's model."""
    async with open_mesh() as mesh:
        (model,) = await mesh.client.models()
        assert (model.name, model.context_length, model.chat) == (MODEL, CONTEXT, True)
        assert abs(model.created.timestamp() - time.time()) < 60


async def test_what_is_too_much_is_refused_with_a_time_to_come_back() -> None:
    """Beyond max_streams requests get RESOURCE_EXHAUSTED with RetryInfo; a place is free when a stream ends."""
    async with open_mesh(max_streams=1) as mesh:
        async with call(mesh, pb.GenerateRequest(prompt="hi")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await mesh.stub.Submit(pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi")))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            (retry,) = [
                each
                for each in rpc_status.from_call(caught.value).details
                if each.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
            ]
            info = error_details_pb2.RetryInfo()
            retry.Unpack(info)
            assert info.retry_delay.ToMilliseconds() == 1000
            await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
        async with call(mesh, pb.GenerateRequest(prompt="hi")):
            pass


class FullLog(MemoryBus):
    """A log that does not say whether it took a request."""

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        offset = await super().publish(partition, value, key=key, headers=headers)
        if partition.topic == REQUESTS_INTERACTIVE.name:
            raise Unavailable("the log did not answer", retry_after=3)
        return offset


class SmallLog(MemoryBus):
    """A log that takes no request so large."""

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        if partition.topic == REQUESTS_INTERACTIVE.name:
            raise RequestTooLarge("more than the log takes")
        return await super().publish(partition, value, key=key, headers=headers)


async def test_a_request_that_may_not_be_in_the_log_is_refused_and_cancelled() -> None:
    """Where publishing fails the client gets UNAVAILABLE, and what may have got there all the same is cancelled: that, and
    no other request of its id."""
    async with open_mesh(log=FullLog()) as mesh:
        with pytest.raises(Unavailable, match="did not answer") as caught:
            await mesh.client.submit("hi", request_id="r-1")
        assert caught.value.retry_after == 3
        cancel, job = await mesh.engine.cancelled(), await mesh.engine.job()
        assert of_client(cancel.request_id) == of_client(job.request.request_id) == "r-1"
        assert cancel.accepted_at == job.request.accepted_at


async def test_what_was_not_sent_is_not_cancelled() -> None:
    """A record that the log never takes needs no end: a cancellation could only reach another request of its id."""
    async with open_mesh(log=SmallLog()) as mesh:
        with pytest.raises(RequestTooLarge):
            await mesh.client.submit("hi", request_id="r-1")
        await nobody_was_cancelled(mesh)


async def test_the_clients_trace_travels_with_the_request() -> None:
    """The record's headers carry on the trace that the call came with."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with open_mesh() as mesh:
        await mesh.stub.Submit(
            pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi")),
            metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),),
        )
        headers = dict((await mesh.engine.job()).record.headers)
        assert trace_id.encode() in headers["traceparent"]


async def test_a_second_engine_goes_on_where_the_client_stands() -> None:
    """A request that another engine starts again under a higher epoch is shown once; what the first still writes is
    ignored."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one ", epoch=1)
        first = await anext(answer)
        second_engine = Job(job.request, job.record)
        await mesh.engine.say(second_engine, "one", epoch=2)
        await mesh.engine.say(job, "ZOMBIE", epoch=1)
        await mesh.engine.say(second_engine, " two", finish=LENGTH, epoch=2)
        assert isinstance(first, Tokens)
        assert first.text + await answer.read() == "one two"


async def test_another_text_is_an_error_and_never_shown() -> None:
    """Where a second engine wrote another text the stream ends with ABORTED, and the request is cancelled."""
    async with open_mesh() as mesh, mesh.client.generate("hi", request_id="r-1") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one", epoch=1)
        await anext(answer)
        await mesh.engine.say(Job(job.request, job.record), "two three", epoch=2)
        with pytest.raises(StreamFailed, match="another text"):
            await anext(answer)
        assert of_client((await mesh.engine.cancelled()).request_id) == "r-1"


async def test_a_record_that_is_missing_is_an_error() -> None:
    """A gap ends the stream with ABORTED."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        mesh.engine.part(job, ids("lost"))
        await mesh.engine.say(job, "found")
        with pytest.raises(StreamFailed, match="missing"):
            await anext(answer)


async def test_a_cursor_holds_the_epoch_and_hash_that_resuming_needs() -> None:
    """Count, hash, epoch and source of the cursor are those of what was shown."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "abc", epoch=(1 << 32) + 2)
        tokens = await anext(answer)
        assert isinstance(tokens, Tokens)
        now = CURSORS.decode(tokens.cursor)
        assert now.places[0].prefix == Prefix(3, extend_hash(0, ids("abc")))
        assert (now.mark, now.source.partition) == (Mark(1, (1 << 32) + 2), job.record.partition)


async def test_a_cancelled_task_of_the_client_is_no_error_here() -> None:
    """Many calls that are dropped at once leave nothing behind."""
    async with open_mesh() as mesh:
        for _ in range(20):
            async with call(mesh, pb.GenerateRequest(prompt="hi", cancel_on_disconnect=True)):
                await mesh.engine.job()
        assert len([await mesh.engine.cancelled() for _ in range(20)]) == 20
        assert "holdfast_gateway_open_requests 0.0" in (await mesh.http.get("/metrics")).text
