"""What streams do when the tokenizer goes away, comes back, or refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from holdfast import rpc
from holdfast.errors import ConfigurationError, InternalError, InvalidRequest, StreamFailed, Unavailable
from holdfast.events import Accepted
from holdfast.v1 import tokenizer_pb2
from services.gateway.readiness import Readiness
from services.gateway.tokenizer import Tokenizer
from tests.gateway.doubles import LENGTH, ByteTokenizer, open_mesh, tokenizing


class Unhealthy(ByteTokenizer):
    """A tokenizer whose Decode raises what it is given, once for each, when it is asked something."""

    def __init__(self, *errors: Exception | None, **options: Any) -> None:
        super().__init__(**options)
        self.errors = list(errors)

    @rpc.stream
    async def Decode(
        self, requests: AsyncIterator[tokenizer_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[tokenizer_pb2.DecodeResponse]:
        async for request in requests:
            self.decode_messages.append(request)
            if self.errors:
                error = self.errors.pop(0)
                if error is None:
                    return
                raise error
            yield tokenizer_pb2.DecodeResponse(items=[self._decoded(item) for item in request.items])


async def test_all_streams_of_a_step_are_decoded_by_one_message() -> None:
    """A record with the tokens of several requests asks the tokenizer once."""
    async with (
        open_mesh() as mesh,
        mesh.client.generate("hi", num_choices=3) as answer,
    ):
        await anext(answer)
        job = await mesh.engine.job()
        parts = [mesh.engine.part(job, b"abc", choice=choice, finish=LENGTH) for choice in range(3)]
        await mesh.engine.write(job, *parts)
        assert await answer.read() == "abc"
        (message,) = mesh.tokenizer.decode_messages
        assert [bytes(item.ids) for item in message.items] == [b"abc"] * 3
        assert [bytes(item.context) for item in message.items] == [b"hi"] * 3
        assert [item.last for item in message.items] == [True] * 3


async def test_streams_wait_for_a_tokenizer_that_comes_back() -> None:
    """A tokenizer that is stopped and started again in the middle of a stream costs no character; meanwhile the gateway
    is not ready."""
    async with open_mesh() as mesh, mesh.client.generate("hi") as answer:
        assert isinstance(await anext(answer), Accepted)
        job = await mesh.engine.job()
        await mesh.engine.say(job, b"one \xe2\x82")
        texts = [(await anext(answer)).text]  # type: ignore[union-attr]
        await mesh.tokenizer_life.aclose()
        while (await mesh.http.get("/readyz")).status_code == 200:
            pass
        missing = {"tokenizer": "the tokenizer does not answer"}
        assert (await mesh.http.get("/readyz")).json()["missing"] == missing
        assert not await mesh.client.health()
        await mesh.engine.say(job, b"\xac two")
        await mesh.engine.say(job, " three", finish=LENGTH)
        async with tokenizing(ByteTokenizer(), address=mesh.tokenizer_address):
            texts.append(await answer.read())
        assert texts == ["one ", "€ two three"]


@pytest.mark.parametrize("error", [None, Unavailable("going away"), InternalError("a hiccup")])
async def test_a_call_that_ends_is_made_again(error: Exception | None) -> None:
    """Whether the tokenizer ends the call, fails it, or has a fault for once, what it was asked is asked again."""
    async with open_mesh(tokenizer=Unhealthy(error)) as mesh, mesh.client.generate("hi") as answer:
        await mesh.engine.say(await mesh.engine.job(), "text", finish=LENGTH)
        assert await answer.read() == "text"
        assert [bytes(message.items[0].ids) for message in mesh.tokenizer.decode_messages] == [b"text", b"text"]


@pytest.mark.parametrize(
    "errors", [[InvalidRequest("no such id")], [InternalError("a bug")] * 3], ids=["refused", "thrice a fault"]
)
async def test_what_cannot_be_decoded_fails_its_stream_alone(errors: list[Exception]) -> None:
    """A message that ends every call is not asked for ever: its streams end with ABORTED, the next are served."""
    async with open_mesh(tokenizer=Unhealthy(*errors)) as mesh:
        async with mesh.client.generate("hi") as answer:
            await anext(answer)
            await mesh.engine.say(await mesh.engine.job(), "text")
            with pytest.raises(StreamFailed, match="cannot decode"):
                await anext(answer)
        async with mesh.client.generate("hi") as answer:
            await mesh.engine.say(await mesh.engine.job(), "text", finish=LENGTH)
            assert await answer.read() == "text"


class Slow(ByteTokenizer):
    """A tokenizer that waits before it decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.decoding, self.go_on = asyncio.Event(), asyncio.Event()

    @rpc.stream
    async def Decode(
        self, requests: AsyncIterator[tokenizer_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[tokenizer_pb2.DecodeResponse]:
        async for request in requests:
            self.decode_messages.append(request)
            self.decoding.set()
            await self.go_on.wait()
            yield tokenizer_pb2.DecodeResponse(items=[self._decoded(item) for item in request.items])


async def test_ids_that_come_meanwhile_go_with_the_next_message() -> None:
    """While the tokenizer has a message, all that comes gathers for one more."""
    tokenizer = Slow()
    async with open_mesh(tokenizer=tokenizer) as mesh, mesh.client.generate("hi") as answer:
        await anext(answer)
        job = await mesh.engine.job()
        await mesh.engine.say(job, "a")
        await tokenizer.decoding.wait()
        for text in "bcd":
            await mesh.engine.say(job, text)
        await mesh.engine.say(job, "e", finish=LENGTH)
        await mesh.client.models()  # the gateway has read them all by the time it answers
        tokenizer.go_on.set()
        assert await answer.read() == "abcde"
        assert [bytes(message.items[0].ids) for message in tokenizer.decode_messages] == [b"a", b"bcde"]


async def test_what_nobody_waits_for_is_not_decoded() -> None:
    """The ids of a stream whose client left while they were decoded are not asked for again."""
    tokenizer = Slow()
    async with open_mesh(tokenizer=tokenizer) as mesh:
        async with mesh.client.generate("hi", cancel_on_exit=True) as answer:
            await anext(answer)
            await mesh.engine.say(await mesh.engine.job(), "nobody")
            await tokenizer.decoding.wait()
        await mesh.engine.cancelled()
        tokenizer.go_on.set()
        async with mesh.client.generate("hi") as answer:
            await mesh.engine.say(await mesh.engine.job(), "text", finish=LENGTH)
            assert await answer.read() == "text"
        assert [bytes(message.items[0].ids) for message in tokenizer.decode_messages] == [b"nobody", b"text"]


async def test_requests_wait_for_a_tokenizer_that_is_started_again() -> None:
    """Nobody is told that it was away for a moment."""
    async with open_mesh() as mesh:
        await mesh.tokenizer_life.aclose()
        submitting = asyncio.create_task(mesh.client.submit("hi"))
        while (await mesh.http.get("/readyz")).status_code == 200:
            pass
        async with tokenizing(ByteTokenizer(), address=mesh.tokenizer_address):
            await submitting
        assert bytes((await mesh.engine.job()).request.prompt_token_ids) == b"hi"


async def test_another_tokenizer_stops_the_gateway() -> None:
    """Where the tokenizer that comes back is another one the gateway ends, rather than to mix two vocabularies."""
    with pytest.raises(ConfigurationError, match="changed from bytes"):
        async with open_mesh() as mesh:
            await mesh.tokenizer_life.aclose()
            async with tokenizing(ByteTokenizer(digest="d2"), address=mesh.tokenizer_address):
                await asyncio.Event().wait()


async def test_a_model_is_not_known_before_its_tokenizer_answers() -> None:
    """Until a tokenizer has answered there is no model, and whoever asks is told why."""
    async with rpc.channel("127.0.0.1:1") as channel:
        with pytest.raises(Unavailable, match="no tokenizer has answered"):
            _ = Tokenizer(channel, seconds=1).model


async def test_readiness_tells_what_is_missing_and_who_asked() -> None:
    """Ready means nothing is missing; listeners are told at once and at every change."""
    told = []

    async def listen(ready: bool) -> None:
        told.append(ready)

    readiness = Readiness(["log", "tokenizer"])
    await readiness.tell(listen)
    await readiness.found("log")
    assert readiness.missing.keys() == {"tokenizer"}
    await readiness.found("tokenizer")
    await asyncio.wait_for(readiness.wait(), 1)
    await readiness.lost("log", "broker gone")
    assert readiness.missing == {"log": "broker gone"}
    assert told == [False, False, True, False]
