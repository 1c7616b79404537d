"""The client, against a gateway that plays what each test gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from holdfast.client import Answer, Client
from holdfast.errors import (
    Cancelled,
    DeadlineExceeded,
    HoldfastError,
    Interrupted,
    InvalidRequest,
    NotAccepted,
    NotFound,
    Overloaded,
    StreamFailed,
    Unavailable,
)
from holdfast.events import Accepted, Event, Finished, FinishReason, Resumed, Tokens, Usage
from holdfast.gateways import Patience
from holdfast.v1 import gateway_pb2, generation_pb2
from tests.holdfast.fake_gateway import FakeGateway, accepted, again, finished, resumed, serving, tokens


@asynccontextmanager
async def playing(
    *answer: gateway_pb2.GenerateResponse | Exception, endless: bool = False
) -> AsyncIterator[tuple[FakeGateway, Client]]:
    gateway = FakeGateway(answer, endless=endless)
    async with serving(gateway) as server, Client(server.address) as client:
        yield gateway, client


async def events_of(client: Client, **options: Any) -> list[Event]:
    async with client.generate("Once", **options) as answer:
        return [event async for event in answer]


async def test_an_answer_is_accepted_then_tokens_then_finished() -> None:
    """Each message becomes one event, with everything it carried."""
    async with playing(accepted(), tokens(0, " upon"), tokens(1, " a time", num_tokens=2), finished()) as (_, client):
        events = await events_of(client)
    assert events == [
        Accepted("r-1", cursor="c0", prompt_tokens=3),
        Tokens(0, first_index=0, num_tokens=1, text=" upon", token_ids=(), logprobs=(), cursor="c1"),
        Tokens(0, first_index=1, num_tokens=2, text=" a time", token_ids=(), logprobs=(), cursor="c1"),
        Finished(0, reason=FinishReason.STOP, usage=Usage(3, 1, 2), stop="", cursor="c2"),
    ]


async def test_text_is_the_answer_in_pieces_or_whole() -> None:
    """Of choice 0; a piece is never empty."""
    first = (accepted(), tokens(0, "a"), tokens(0, "x", choice=1), tokens(1, ""))
    async with playing(*first, finished(choice=1), tokens(2, "b"), finished()) as (_, client):
        assert [piece async for piece in client.generate("Once", num_choices=2).text()] == ["a", "b"]
        assert await client.generate("Once", num_choices=2).read() == "ab"


async def test_log_probabilities_arrive() -> None:
    """Of the chosen token and the likeliest ones."""
    message = tokens(0, "a")
    top = [generation_pb2.TopLogprob(token_id=7, logprob=-0.5), generation_pb2.TopLogprob(token_id=8, logprob=-1.5)]
    message.tokens.logprobs.append(generation_pb2.TokenLogprobs(logprob=-1.5, top=top))
    async with playing(accepted(), message, finished()) as (_, client):
        events = await events_of(client, logprobs=2)
    assert isinstance(events[1], Tokens)
    (logprobs,) = events[1].logprobs
    assert logprobs.logprob == -1.5
    assert [(each.token_id, each.logprob) for each in logprobs.top] == [(7, -0.5), (8, -1.5)]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([accepted(), tokens(0, "a"), tokens(2, "c")], "token 2 of choice 0 came where token 1 was due"),
        ([accepted(), tokens(0, "a"), tokens(0, "a")], "token 0 of choice 0 came where token 1 was due"),
        ([accepted(), tokens(0, "ab", num_tokens=2), tokens(1, "b")], "token 1 of choice 0 came where token 2"),
        ([accepted(), finished(), tokens(0, "a")], "choice 0 has ended"),
        ([accepted(), tokens(0, "a", choice=1)], "choice 1 has ended, or was not asked for"),
        ([tokens(0, "a")], "before the request was accepted"),
        ([accepted(), accepted()], "accepted twice"),
        ([accepted(), tokens(0, "a")], "ended before choices \\[0\\] did"),
        ([], "ended before"),
        ([accepted(), gateway_pb2.GenerateResponse()], "does not know"),
    ],
)
async def test_a_gap_or_a_duplicate_is_an_error(answer: list[gateway_pb2.GenerateResponse], text: str) -> None:
    """Whatever a gateway sends that does not follow from what it sent before raises StreamFailed."""
    async with playing(*answer) as (_, client):
        with pytest.raises(StreamFailed, match=text):
            await events_of(client)


async def test_missing_token_ids_are_an_error_where_they_were_asked_for() -> None:
    """One id for each token."""
    async with playing(accepted(), tokens(0, "a"), finished()) as (_, client):
        with pytest.raises(StreamFailed, match="token ids"):
            await events_of(client, return_token_ids=True)


async def test_leaving_the_block_ends_the_call() -> None:
    """grpcio 1.83 and later does not end an abandoned call (grpc/grpc#43462); the client does."""
    async with playing(accepted(), endless=True) as (gateway, client):
        async with client.generate("Once") as answer:
            async for event in answer:
                if isinstance(event, Tokens) and event.first_index == 5:
                    break
            assert not gateway.left.is_set()
        await asyncio.wait_for(gateway.left.wait(), 10)


async def test_breaking_out_of_the_loop_ends_the_call() -> None:
    """An answer that only its loop holds is closed by `break`, without a block."""
    async with playing(accepted(), endless=True) as (gateway, client):
        async for event in client.generate("Once"):
            if isinstance(event, Tokens):
                break
        await asyncio.wait_for(gateway.left.wait(), 10)


async def test_breaking_out_of_the_text_ends_the_call() -> None:
    """As for the events."""
    async with playing(accepted(), endless=True) as (gateway, client):
        async for _ in client.generate("Once").text():
            break
        await asyncio.wait_for(gateway.left.wait(), 10)


async def test_an_exception_in_the_loop_ends_the_call() -> None:
    """However the loop is left."""
    async with playing(accepted(), endless=True) as (gateway, client):
        with pytest.raises(LookupError):
            async for _ in client.generate("Once"):
                raise LookupError
        await asyncio.wait_for(gateway.left.wait(), 10)


async def test_cancelling_the_task_ends_the_call() -> None:
    """And the task ends cancelled, not with an error of ours."""
    async with playing(accepted(), endless=True) as (gateway, client):
        started = asyncio.Event()

        async def listen() -> None:
            async for _ in client.generate("Once"):
                started.set()

        task = asyncio.ensure_future(listen())
        await asyncio.wait_for(started.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gateway.left.wait(), 10)


async def test_an_answer_can_be_closed_by_another_task() -> None:
    """Whoever waits for its next event learns that it was closed; afterwards it is simply over."""
    async with playing(accepted(), endless=True) as (gateway, client):
        answer = client.generate("Once")
        started = asyncio.Event()

        async def listen() -> None:
            async for _ in answer:
                started.set()

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(_swallow(listen()))
            await asyncio.wait_for(started.wait(), 10)
            await answer.aclose()
        assert task.result() is None or isinstance(task.result(), Cancelled)
        await asyncio.wait_for(gateway.left.wait(), 10)
        assert [event async for event in answer] == []


async def _swallow(listening: Any) -> HoldfastError | None:
    try:
        await listening
    except HoldfastError as error:
        return error
    return None


@pytest.mark.parametrize("how", ["aclose", "break", "client"])
@pytest.mark.parametrize("cancel_on_exit", [True, False])
async def test_leaving_cancels_the_request_or_not_as_asked(cancel_on_exit: bool, how: str) -> None:
    """Whichever way it is left: by its block, by the loop that held it, with the whole client."""
    async with playing(accepted(), endless=True) as (gateway, client):
        answer: Answer | None = client.generate("Once", cancel_on_exit=cancel_on_exit)
        assert answer is not None
        async for event in answer:
            if isinstance(event, Tokens):
                break
        if how == "aclose":
            await answer.aclose()
        if how == "break":
            answer = None
        await client.__aexit__(None, None, None)
        await gateway.left.wait()
        assert gateway.cancelled == [request.request_id for request in gateway.requests if cancel_on_exit]
        assert not gateway.requests[0].cancel_on_disconnect


async def test_an_answer_that_has_ended_cancels_nothing() -> None:
    """Neither one that was read to its end nor one that failed."""
    async with playing(accepted(), finished()) as (gateway, client):
        await client.generate("Once").read()
        gateway.answer = [accepted(), StreamFailed("no blocks")]
        with pytest.raises(StreamFailed):
            await client.generate("Once").read()
    assert gateway.cancelled == []


@pytest.mark.parametrize("cancel_on_exit", [True, False])
async def test_an_answer_that_does_not_resume_may_have_the_connection_for_its_lifetime(cancel_on_exit: bool) -> None:
    """The gateway is told at the start, so that it holds for a lost connection too."""
    async with playing(accepted(), finished()) as (gateway, client):
        await client.generate("Once", cancel_on_exit=cancel_on_exit, resume=False).read()
    assert gateway.requests[0].cancel_on_disconnect is cancel_on_exit


SOON = Patience(tries=3, first_seconds=0.001, most_seconds=0.001)


async def test_a_stream_that_breaks_goes_on_and_nobody_sees_it() -> None:
    """At the last cursor, as often as need be; each event that comes gives new tries."""
    broken = Unavailable("the gateway is being stopped")
    gateway = FakeGateway(
        [accepted(), tokens(0, "a"), broken],
        resumed=[
            [broken],
            [Overloaded("the client reads too slowly")],
            [resumed(1), again(tokens(1, "b")), broken],
            [broken],
            [broken],
            [resumed(2), again(tokens(2, "c")), again(finished())],
        ],
    )
    async with serving(gateway) as server, Client(server.address, patience=SOON) as client:
        events = [event async for event in client.generate("Once")]
    assert "".join(event.text for event in events if isinstance(event, Tokens)) == "abc"
    assert [type(event) for event in events] == [Accepted, Tokens, Tokens, Tokens, Finished]
    assert gateway.cursors == ["c1"] * 6


async def test_a_stream_that_goes_on_elsewhere_than_it_broke_is_an_error() -> None:
    """What is missing, or would come twice, is never shown."""
    gateway = FakeGateway([accepted(), tokens(0, "a"), Unavailable("gone")], resumed=[[resumed(2)]])
    async with serving(gateway) as server, Client(server.address, patience=SOON) as client:
        with pytest.raises(StreamFailed, match=r"went on at tokens \[2\] where \[1\] were due"):
            await client.generate("Once").read()


async def test_tries_are_bounded_and_the_error_has_the_last_cursor() -> None:
    """Whoever gets it can resume later."""
    gateway = FakeGateway([accepted(), tokens(0, "a"), Unavailable("gone")])
    async with serving(gateway) as server, Client(server.address, patience=SOON) as client:
        with pytest.raises(Interrupted, match="3 tries to go on with it failed.*being stopped.*c1") as caught:
            await client.generate("Once").read()
    assert caught.value.cursor == "c1"
    assert gateway.cursors == ["c1"] * 3
    assert gateway.cancelled == []


async def test_a_stream_that_cannot_be_resumed_says_why() -> None:
    """Trying again would not help."""
    gateway = FakeGateway([accepted(), tokens(0, "a"), Unavailable("gone")], resumed=[[NotFound("not kept any more")]])
    async with serving(gateway) as server, Client(server.address, patience=SOON) as client:
        with pytest.raises(StreamFailed, match="cannot be resumed: not kept any more .*c1"):
            await client.generate("Once").read()


async def test_a_cursor_is_resumed_from_the_start() -> None:
    """The first event says where the stream goes on, and counting begins there."""
    gateway = FakeGateway(resumed=[[resumed(7, 2, ended=[1]), again(tokens(7, "h")), again(finished())]])
    async with serving(gateway) as server, Client(server.address) as client:
        events = [event async for event in client.resume("c1")]
        assert isinstance(events[0], Resumed)
        assert [type(event) for event in events] == [Resumed, Tokens, Finished]
        with pytest.raises(InvalidRequest, match="no cursor"):
            gateway.resumed = [*gateway.resumed, [InvalidRequest("no cursor", field="cursor")]]
            await client.resume("c2").read()
    assert gateway.cursors == ["c1", "c2"]


async def test_of_several_gateways_the_next_one_goes_on() -> None:
    """Where the one in use is gone without a word; also for what is asked later."""
    second = FakeGateway([accepted(), finished()], resumed=[[resumed(1), again(tokens(1, "b")), again(finished())]])
    first = FakeGateway([accepted(), tokens(0, "a")], hold=True)
    async with (
        AsyncExitStack() as life,
        serving(second) as there,
        Client([(await life.enter_async_context(serving(first))).address, there.address], patience=SOON) as client,
    ):
        async with client.generate("Once") as answer:
            events = [await anext(answer), await anext(answer)]
            await life.aclose()
            events += [event async for event in answer]
        assert "".join(event.text for event in events if isinstance(event, Tokens)) == "ab"
        assert client.address == there.address
        await client.cancel("r-9")
        await client.generate("Once").read()
    assert (second.cancelled, len(second.requests)) == (["r-9"], 1)


async def test_a_request_that_may_have_been_accepted_is_asked_anew_under_another_id() -> None:
    """Where the first gateway refuses as one that stops, and the id is the client's own; the first id is cancelled."""
    first, second = FakeGateway([Unavailable("being stopped")]), FakeGateway([accepted(), tokens(0, "a"), finished()])
    async with (
        serving(first) as here,
        serving(second) as there,
        Client(f"{here.address},{there.address}") as client,
    ):
        assert await client.generate("Once").read() == "a"
        with pytest.raises(Unavailable, match="being stopped"):
            second.answer = first.answer
            await client.generate("Once").read()
    assert first.requests[0].request_id != second.requests[0].request_id
    assert first.requests[0].request_id in [*first.cancelled, *second.cancelled]


STOPS = NotAccepted("being stopped")


async def test_what_nobody_accepted_is_asked_again_as_it_is() -> None:
    """As often as patience allows, of a gateway that stops, or starts again: under the id that was given, too."""
    gateway = FakeGateway([STOPS], refusals=[STOPS] * 3)
    async with serving(gateway) as server, Client(server.address, patience=SOON) as client:
        assert (await client.submit("Once", request_id="mine")).request_id == "mine"
        assert [each.request.request_id for each in gateway.submitted] == ["mine"] * 4
        with pytest.raises(NotAccepted):
            await client.generate("Once", request_id="mine").read()
        assert [request.request_id for request in gateway.requests] == ["mine"] * 4
        gateway.refusals = [STOPS] * 4
        with pytest.raises(NotAccepted):
            await client.submit("Once")
    assert gateway.cancelled == []


async def test_what_may_have_been_accepted_is_submitted_anew_only_under_another_id() -> None:
    """And the first one is ended. Where the id was given, the client is told that nobody knows."""
    lost = Unavailable("the log gave no ack")
    gateway, other = FakeGateway(refusals=[lost] * 2), FakeGateway()
    async with (
        serving(gateway) as here,
        serving(other) as there,
        Client([here.address, there.address], patience=SOON) as client,
        Client([here.address, there.address], patience=SOON) as careful,
    ):
        submitted = await client.submit("Once")
        with pytest.raises(Unavailable, match="gave no ack"):
            await careful.submit("Once", request_id="mine")
    first, given = gateway.submitted
    assert [each.request.request_id for each in other.submitted] == [submitted.request_id]
    assert [*gateway.cancelled, *other.cancelled] == [first.request.request_id] != [submitted.request_id]
    assert given.request.request_id == "mine"


@pytest.mark.parametrize("call", [lambda c: c.generate("Once").read(), lambda c: c.submit("Once")])
async def test_leaving_before_a_request_is_asked_anew_ends_the_first_one(
    call: Callable[[Client], Coroutine[Any, Any, object]],
) -> None:
    """Which may have been accepted, though nobody was told."""
    waits = asyncio.Event()

    class Told(Patience):
        def before(self, index: int) -> float:
            waits.set()
            return 60

    lost = Unavailable("the log gave no ack")
    one, other = [FakeGateway([lost], refusals=[lost]) for _ in range(2)]
    async with (
        serving(one) as here,
        serving(other) as there,
        Client([here.address, there.address], patience=Told()) as client,
    ):
        asking = asyncio.ensure_future(call(client))
        await waits.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    asked = [*one.requests, *(each.request for each in one.submitted)]
    assert [*one.cancelled, *other.cancelled] == [request.request_id for request in asked]
    assert len(asked) == 1


async def test_a_gateway_that_misses_something_is_not_waited_for() -> None:
    """Only one that went is: otherwise each gateway is asked once."""
    gateway = FakeGateway(refusals=[Unavailable("the log is missing")] * 2)
    async with serving(gateway) as server, Client(server.address) as client:
        with pytest.raises(Unavailable, match="log is missing"):
            await client.submit("Once")
    assert len(gateway.submitted) == 1


async def test_a_stream_comes_back_to_a_full_gateway_when_it_was_told_to() -> None:
    """Not before: with its own pauses it would have tried in vain often enough to give up."""
    gateway = FakeGateway(
        [accepted(), tokens(0, "a"), Unavailable("gone")],
        resumed=[[Overloaded("full", retry_after=0.2)], [resumed(1), again(finished())]],
    )
    loop = asyncio.get_running_loop()
    async with serving(gateway) as server, Client(server.address, patience=SOON) as client:
        began = loop.time()
        assert await client.generate("Once").read() == "a"
        assert loop.time() - began >= 0.2


async def test_leaving_a_stream_between_two_tries_cancels_its_request() -> None:
    """Though there is no call then."""
    waits = asyncio.Event()

    class Told(Patience):
        def before(self, index: int) -> float:
            waits.set()
            return 60

    gateway = FakeGateway([accepted(), tokens(0, "a"), Unavailable("gone")])
    async with serving(gateway) as server, Client(server.address, patience=Told()) as client:
        answer = client.generate("Once")
        reading = asyncio.ensure_future(answer.read())
        await waits.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await answer.aclose()
    assert gateway.cancelled == [gateway.requests[0].request_id]


async def test_a_result_arrives_whole() -> None:
    """Every field of it."""
    async with playing() as (_, client):
        result = await client.result("c0")
    (choice,) = result.choices
    assert (result.request_id, result.prompt_tokens, result.complete) == ("r-1", 3, True)
    assert (choice.text, choice.num_tokens, choice.finished and choice.finished.reason) == ("a b", 2, FinishReason.STOP)


async def test_nothing_is_sent_for_an_answer_that_nobody_awaits() -> None:
    """An answer begins with its first event."""
    async with playing(accepted(), finished()) as (gateway, client):
        client.generate("Once")
        await client.health()
        assert gateway.requests == []


async def test_every_option_reaches_the_gateway() -> None:
    """Under its own name; what is left out stays absent."""
    async with playing(accepted(), finished()) as (gateway, client):
        await client.generate(
            messages=[{"role": "user", "content": "Hi", "name": "Ada"}],
            template_args={"tools": []},
            request_id="mine",
            model="tiny",
            max_tokens=5,
            min_tokens=2,
            stop=["\n"],
            stop_token_ids=[9],
            ignore_eos=True,
            temperature=0,
            top_k=40,
            seed=1 << 40,
            logit_bias={3: -100},
            logprobs=0,
            request_class="batch",
            timeout=1.5,
        ).read()
    (request,) = gateway.requests
    assert (request.request_id, request.model) == ("mine", "tiny")
    (message,) = request.chat.messages
    assert (message.role, message.content, message.fields_json) == ("user", "Hi", '{"name": "Ada"}')
    assert request.chat.template_args_json == '{"tools": []}'
    assert (request.stop.max_tokens, request.stop.min_tokens, request.stop.ignore_eos) == (5, 2, True)
    assert (list(request.stop.stop), list(request.stop.stop_token_ids)) == (["\n"], [9])
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.logprobs) == (0, 40, 1 << 40, 0)
    assert sampling.HasField("temperature") and sampling.HasField("logprobs") and not sampling.HasField("top_p")
    assert dict(sampling.logit_bias) == {3: -100}
    assert request.request_class == generation_pb2.REQUEST_CLASS_BATCH
    assert request.timeout.ToMilliseconds() == 1500
    assert gateway.timeouts[0] is not None and gateway.timeouts[0] > 1.5


async def test_token_ids_and_prompts_are_inputs_too() -> None:
    """Exactly one input goes over the wire."""
    async with playing(accepted(), finished()) as (gateway, client):
        await client.generate(token_ids=[1, 2]).read()
        await client.generate("Once").read()
    assert [request.WhichOneof("input") for request in gateway.requests] == ["token_ids", "prompt"]
    assert list(gateway.requests[0].token_ids.ids) == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        (None, {}, "exactly one"),
        ("Once", {"token_ids": [1]}, "exactly one"),
        ("Once", {"max_tokens": -1}, "cannot be sent"),
        ("Once", {"temperature": "hot"}, "cannot be sent"),
        ("Once", {"timeout": float("inf")}, "cannot be sent"),
        ("Once", {"stop": "\n"}, "a list"),
        ("Once", {"request_class": "slow"}, "interactive or batch"),
        (None, {"messages": [{"role": "user"}]}, "a role and a content"),
        (None, {"messages": [{"role": "user", "content": "Hi", "x": {1}}]}, "cannot be sent"),
    ],
)
async def test_what_the_wire_cannot_carry_is_refused_at_once(
    prompt: str | None, options: dict[str, Any], text: str
) -> None:
    """Before anything is sent, with what would be right."""
    async with Client() as client:
        with pytest.raises(InvalidRequest, match=text):
            client.generate(prompt, **options)


async def test_an_unknown_option_is_a_type_error() -> None:
    """As for any function."""
    async with Client() as client:
        with pytest.raises(TypeError, match="max_token"):
            client.generate("Once", max_token=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("temperature is in [0, 100]", field="sampling.temperature"),
        NotFound("no model 'x'; there is: tiny"),
        Overloaded("too many wait", retry_after=7.0),
        Unavailable("no engine", retry_after=2.0),
        Cancelled("the gateway is told to stop"),
        DeadlineExceeded("too late"),
        StreamFailed("the engine ran out of blocks"),
    ],
)
@pytest.mark.parametrize("after", [(), (accepted(), tokens(0, "a"))])
async def test_an_error_of_the_mesh_is_raised_as_it_was(
    error: HoldfastError, after: tuple[gateway_pb2.GenerateResponse, ...]
) -> None:
    """Same class, text and fields, before the request is accepted and after it."""
    async with playing(*after, error) as (_, client):
        with pytest.raises(type(error)) as caught:
            await events_of(client, resume=False)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


async def test_a_missing_gateway_is_named() -> None:
    """The address is in the error."""
    async with serving(FakeGateway()) as server:
        address = server.address
    async with Client(address) as client:
        with pytest.raises(Unavailable, match=f"no gateway answers at {address}"):
            await client.generate("Once").read()
        with pytest.raises(Unavailable, match=f"no gateway answers at {address}"):
            await client.models()


async def test_submit_cancel_models_and_health() -> None:
    """The calls that do not stream."""
    gateway = FakeGateway()
    async with serving(gateway) as server, Client(server.address) as client:
        submitted = await client.submit("Once", max_tokens=3, request_id="mine")
        assert (submitted.request_id, submitted.cursor) == ("mine", "c0")
        assert gateway.submitted[0].request.stop.max_tokens == 3
        assert not gateway.submitted[0].request.cancel_on_disconnect
        await client.cancel("mine")
        assert gateway.cancelled == ["mine"]
        (model,) = await client.models()
        assert (model.name, model.context_length, model.chat) == ("tiny", 512, True)
        assert model.created == datetime.fromtimestamp(1_700_000_000, UTC)
        assert not await client.health()
        await server.health.ready()
        assert await client.health()
        assert await client.needs() == {"log": True, "tokenizer": True, "engine": True}
