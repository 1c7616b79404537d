"""A gateway that stops: its clients go on elsewhere, and none of them sees an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest

from holdfast import rpc
from holdfast.bus import Bus
from holdfast.client import Answer, Client
from holdfast.errors import Unavailable, from_rpc_error
from holdfast.events import Accepted, Event, Finished, Tokens
from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc
from tests.conftest import OpenBus, complaints
from tests.gateway.doubles import (
    LENGTH,
    ByteTokenizer,
    Face,
    FakeEngine,
    Two,
    open_face,
    playing_engine,
    tokenizing,
    two_gateways,
)

LONG = 60.0
"""Seconds that a gateway may drain: longer than a test may take."""


@asynccontextmanager
async def two(drain_seconds: float) -> AsyncIterator[Two]:
    """Gateways of one mesh, whose log is in memory."""
    async with (
        MemoryBus() as bus,
        two_gateways(lambda: contextlib.nullcontext(bus), drain_seconds=drain_seconds) as mesh,
    ):
        yield mesh


@asynccontextmanager
async def called(face: Face, request: pb.GenerateRequest) -> AsyncIterator[Any]:
    """A call that no library makes."""
    async with rpc.channel(face.addresses.grpc) as channel:
        stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
        async with rpc.streaming(stub.Generate(request)) as call:
            yield call


async def nobody_was_cancelled(engine: FakeEngine, client: Client) -> None:
    await client.cancel("a-probe")
    assert of_client((await engine.cancelled()).request_id) == "a-probe"


async def rest(answer: Answer) -> list[Event]:
    return [event async for event in answer]


async def test_streams_move_at_once_when_their_gateway_stops(open_bus: OpenBus) -> None:
    """It does not wait for them, though it could for a minute; its clients see one text, and nothing of the move. So when
    the second one stops, once the first is back."""
    async with two_gateways(open_bus, drain_seconds=LONG) as mesh, AsyncExitStack() as parts:
        here, there = mesh.first.addresses.grpc, mesh.second.addresses.grpc
        client = await parts.enter_async_context(Client([here, there]))
        answer = client.generate("hi")
        events = [await anext(answer)]
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one ")
        events.append(await anext(answer))
        waiting = client.generate("ho")
        await anext(waiting)
        other = await mesh.engine.job()

        await mesh.first.life.aclose()
        await mesh.engine.say(job, "two ")
        events.append(await anext(answer))
        assert client.address == there

        tokenizer = await parts.enter_async_context(tokenizing(ByteTokenizer()))
        await parts.enter_async_context(open_face(mesh.bus, tokenizer.address, address=here, reply_partition=5))
        await mesh.second.life.aclose()
        await mesh.engine.say(job, "three", finish=LENGTH)
        events += await rest(answer)
        assert [type(event) for event in events] == [Accepted, Tokens, Tokens, Tokens, Finished]
        assert "".join(event.text for event in events if isinstance(event, Tokens)) == "one two three"
        await mesh.engine.say(other, "x", finish=LENGTH)
        assert [type(event) for event in await rest(waiting)] == [Tokens, Finished]
        await nobody_was_cancelled(mesh.engine, client)


async def test_a_gateway_without_another_is_waited_for() -> None:
    """Until it has started again: streams go on, and what was asked for meanwhile is answered."""
    async with (
        MemoryBus() as bus,
        playing_engine(bus) as engine,
        tokenizing(ByteTokenizer()) as tokenizer,
        AsyncExitStack() as again,
        open_face(bus, tokenizer.address, drain_seconds=LONG) as face,
        Client(face.addresses.grpc) as client,
        asyncio.TaskGroup() as group,
    ):
        answer = client.generate("hi")
        await anext(answer)
        job = await engine.job()
        await engine.say(job, "before ")
        first = await anext(answer)
        await face.life.aclose()
        reading = group.create_task(rest(answer))
        asking = group.create_task(client.generate("ho", request_id="given").read())
        submitting = group.create_task(client.submit("ha"))
        await engine.say(job, "after", finish=LENGTH)
        await again.enter_async_context(open_face(bus, tokenizer.address, address=face.addresses.grpc))
        jobs = [await engine.job() for _ in range(2)]
        assert {of_client(job.request.request_id) for job in jobs} == {"given", (await submitting).request_id}
        for each in jobs:
            await engine.say(each, "x", finish=LENGTH)
        assert await asking == "x"
        events = [first, *await reading]
        assert "".join(event.text for event in events if isinstance(event, Tokens)) == "before after"
        assert isinstance(events[-1], Finished)


async def test_who_comes_while_a_gateway_drains_is_served_by_another() -> None:
    """Whatever is asked for, with an id of one's own as well; and what waited for a result there waits elsewhere."""
    async with two(LONG) as mesh, asyncio.TaskGroup() as group:

        async def ask() -> None:
            while await mesh.first.client.health():
                pass
            text = group.create_task(clients[0].generate("hi", request_id="given", resume=False).read())
            job = await mesh.engine.job()
            assert (of_client(job.request.request_id), job.request.reply_partition) == ("given", 4)
            await mesh.engine.say(job, "text", finish=LENGTH)
            assert await text == "text"
            submitted = await clients[1].submit("hi", request_id="mine")
            job = await mesh.engine.job()
            assert (of_client(job.request.request_id), job.request.reply_partition) == ("mine", 4)
            await mesh.engine.say(job, "whole", finish=LENGTH)
            assert (await clients[2].result(submitted.cursor)).choices[0].text == "whole"
            await clients[3].cancel("a-request")
            assert of_client((await mesh.engine.cancelled()).request_id) == "a-request"
            await mesh.engine.say(first, "late", finish=LENGTH)
            assert (await waiting).choices[0].text == "late"
            await mesh.engine.say(held, "end", finish=LENGTH)
            assert [message.WhichOneof("event") async for message in call][-1] == "finished"

        async with AsyncExitStack() as parts:
            both = [mesh.first.addresses.grpc, mesh.second.addresses.grpc]
            clients = [await parts.enter_async_context(Client(both)) for _ in range(5)]
            submitted = await clients[4].submit("hi")
            first = await mesh.engine.job()
            waiting = group.create_task(clients[4].result(submitted.cursor))
            call = await parts.enter_async_context(called(mesh.first, pb.GenerateRequest(prompt="hi")))
            held = await mesh.engine.job()
            asking = group.create_task(ask())
            await mesh.first.life.aclose()
            await asking
            assert [client.address for client in clients] == [both[1]] * 3 + [both[0], both[1]]


async def test_a_client_that_says_nothing_has_the_time_to_drain() -> None:
    """Then its stream ends with a status that tells it to go on elsewhere at once, and its request runs on, though it was to
    end with the connection: it was not the client that left."""
    async with two(0.2) as mesh:
        request = pb.GenerateRequest(prompt="hi", cancel_on_disconnect=True)
        async with called(mesh.first, request) as call:
            job = await mesh.engine.job()
            await mesh.engine.say(job, "one ")
            messages = aiter(call)
            await anext(messages)
            last = (await anext(messages)).tokens
            await mesh.first.life.aclose()
            with pytest.raises(grpc.RpcError) as caught:
                await anext(messages)
        error = from_rpc_error(caught.value)
        assert isinstance(error, Unavailable)
        assert error.retry_after == 0
        await mesh.engine.say(job, "two", finish=LENGTH)
        assert await mesh.second.client.resume(last.cursor).read() == "two"
        await nobody_was_cancelled(mesh.engine, mesh.second.client)


CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.mark.parametrize("path", [CHAT, "/v1/resume"])
async def test_http_streams_with_cursors_break_off_behind_their_last_event(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither as complete nor with an error, so that a browser comes back by itself: the connection is closed within the
    body, when nobody can connect any more. The request runs on."""
    async with two(0.2) as mesh:
        if path == CHAT:
            streaming = mesh.first.http.stream("POST", CHAT, json=HI)
        else:
            cursor = (await mesh.second.client.submit("hi")).cursor
            streaming = mesh.first.http.stream("GET", path, params={"cursor": cursor})
        lines: list[str] = []
        async with streaming as response:
            job = await mesh.engine.job()
            await mesh.engine.say(job, "one ")
            body = response.aiter_lines()
            while not any("one " in line for line in lines):
                lines.append(await anext(body))
            await mesh.first.life.aclose()
            with pytest.raises(httpx.RemoteProtocolError):
                lines.extend([line async for line in body])
        assert not any("error" in line or "[DONE]" in line for line in lines)
        with pytest.raises(httpx.ConnectError):
            await mesh.first.http.get("/healthz")
        cursor = [line for line in lines if line.startswith("id: ")][-1].removeprefix("id: ")
        await mesh.engine.say(job, "two", finish=LENGTH)
        again = mesh.second.http.stream(
            "POST" if path == CHAT else "GET",
            path,
            json=HI if path == CHAT else None,
            headers={"last-event-id": cursor},
        )
        async with again as response:
            more = "".join([line async for line in response.aiter_lines()])
        assert "two" in more
        assert "one" not in more
        await nobody_was_cancelled(mesh.engine, mesh.second.client)
    assert not complaints(caplog)


async def test_what_has_no_cursor_ends_with_its_gateway() -> None:
    """With an error; and nobody computes what nobody could read."""
    async with two(0.2) as mesh, asyncio.TaskGroup() as group:
        whole = group.create_task(mesh.first.http.post("/v1/completions", json={"prompt": "hi"}))
        both = group.create_task(mesh.first.http.post("/v1/completions", json={"prompt": ["hi", "ho"], "stream": True}))
        jobs = [await mesh.engine.job() for _ in range(3)]
        await mesh.first.life.aclose()
        assert {of_client((await mesh.engine.cancelled()).request_id) for _ in jobs} == {
            of_client(job.request.request_id) for job in jobs
        }
        assert (await whole).status_code == 503
        assert (await both).text.endswith("data: [DONE]\n\n")
        assert "being stopped" in (await both).text


async def test_what_ends_in_time_ends_as_ever() -> None:
    """A call in one piece has the time to drain."""
    async with two(LONG) as mesh, asyncio.TaskGroup() as group:

        async def finish() -> None:
            while await mesh.first.client.health():
                pass
            await mesh.engine.say(job, "whole", finish=LENGTH)

        whole = group.create_task(mesh.first.http.post("/v1/completions", json={"prompt": "hi"}))
        job = await mesh.engine.job()
        group.create_task(finish())
        await mesh.first.life.aclose()
        assert (await whole).json()["choices"][0]["text"] == "whole"


async def test_a_bus_is_all_that_gateways_share(open_bus: OpenBus) -> None:
    """A request that was on its way to the log when its gateway began to stop is accepted, and goes on at the other."""
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        bus: Bus = await enter(open_bus())
        engine = await enter(playing_engine(bus))
        slow, quick = ByteTokenizer(), ByteTokenizer()
        slow.open.clear()
        first = await enter(
            open_face(bus, (await enter(tokenizing(slow))).address, reply_partition=1, drain_seconds=LONG)
        )
        second = await enter(open_face(bus, (await enter(tokenizing(quick))).address, reply_partition=2))
        client = await enter(Client([first.addresses.grpc, second.addresses.grpc]))
        async with asyncio.TaskGroup() as group:

            async def release() -> None:
                while await first.client.health():
                    pass
                slow.open.set()

            text = group.create_task(client.generate("hi").read())
            await slow.asked.wait()
            group.create_task(release())
            await first.life.aclose()
            job = await engine.job()
            assert job.request.reply_partition == 1
            await engine.say(job, "text", finish=LENGTH)
            assert await text == "text"
            assert client.address == second.addresses.grpc
