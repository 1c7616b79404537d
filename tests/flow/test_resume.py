"""Streams whose gateway is gone go on at another one, and who reads them does not notice."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from holdfast.client import Answer, Client
from holdfast.errors import Cancelled
from holdfast.events import Accepted, Finished, FinishReason, Resumed, Tokens
from holdfast.gateways import Patience
from services.gateway.__main__ import serve as serve_gateway
from services.gateway.settings import GatewaySettings
from tests.conftest import OpenBus
from tests.flow.mesh import ANYWHERE, PATIENCE, is_idle, process, running

KEY = "the key of the mesh of the tests"
LENGTH = 199
"""Tokens of the published text."""
NUM_STREAMS = 8
OFTEN = Patience(tries=50, first_seconds=0.05, most_seconds=0.5)


def begin(client: Client) -> Answer:
    return client.generate(token_ids=[1], max_tokens=LENGTH, temperature=0, timeout=120)


async def read(answer: Answer, begun: asyncio.Event) -> str:
    """The text; `begun` is set once a good part of it is there, and the rest is not."""
    text, num_tokens = "", 0
    async with answer:
        async for event in answer:
            assert not isinstance(event, Resumed), "that is the client's own affair"
            if isinstance(event, Tokens):
                assert event.first_index == num_tokens
                text, num_tokens = text + event.text, num_tokens + event.num_tokens
                if num_tokens >= 20:
                    begun.set()
            elif isinstance(event, Finished):
                assert (event.reason, event.usage.completion_tokens) == (FinishReason.LENGTH, LENGTH)
    return text


@pytest.mark.timeout(240)
async def test_streams_go_on_when_their_gateway_is_stopped(
    open_bus: OpenBus, stories260k: Path, published: str
) -> None:
    """Eight of them, in the middle of the text: every token comes once, and the text is that of an undisturbed one."""
    front = {"cursor_keys": KEY, "reply_partition": 1, "flush_ms": 0}
    async with running(open_bus, stories260k, gateway=front) as mesh, AsyncExitStack() as life:
        settings = GatewaySettings(
            address=ANYWHERE,
            http_address=ANYWHERE,
            tokenizer=mesh.tokenizer,
            reply_partition=2,
            cursor_keys=KEY,  # type: ignore[arg-type]  # as text, as it comes from the environment
            drain_seconds=PATIENCE,  # which it does not take: these clients go on elsewhere by themselves
            flush_ms=0,
        )
        bus = await life.enter_async_context(open_bus())
        doomed = await life.enter_async_context(serve_gateway(settings, bus=bus))
        async with Client([doomed.grpc, mesh.grpc], patience=OFTEN) as client, asyncio.TaskGroup() as group:
            begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
            stories = [group.create_task(read(begin(client), each)) for each in begun]
            for each in begun:
                await each.wait()
            assert client.address == doomed.grpc
            await life.aclose()
        assert client.address == mesh.grpc
        assert [story.result() for story in stories] == [published] * NUM_STREAMS
        await mesh.engine.until(is_idle)


async def test_leaving_a_stream_that_moved_ends_its_request(open_memory: OpenBus, endless_stories: Path) -> None:
    """By its id, through the gateway that is there."""
    async with running(open_memory, endless_stories, gateway={"cursor_keys": KEY}) as mesh:
        answer = mesh.client.generate(token_ids=[1], ignore_eos=True, temperature=1.0, seed=3)
        accepted = await anext(answer)
        assert isinstance(accepted, Accepted)
        async with mesh.client.resume(accepted.cursor) as beside:
            assert isinstance(await anext(beside), Resumed)
            await anext(beside)
        assert isinstance(await anext(answer), Tokens), "leaving the other reader did not end it"
        await answer.aclose()
        await mesh.engine.until(is_idle)
        with pytest.raises((StopAsyncIteration, Cancelled)):
            await anext(answer)


@pytest.mark.kafka
@pytest.mark.timeout(300)
async def test_streams_go_on_when_their_gateway_is_killed(kafka: str, stories260k: Path, published: str) -> None:
    """Processes, and SIGKILL: nobody says goodbye. Then the same gateway, started again, goes on with them as well."""
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        log = {"kafka": kafka, "kafka_namespace": f"test-{uuid.uuid4().hex[:12]}"}
        model = {"model": stories260k, "address": ANYWHERE}
        engine = await enter(process("engine", threads=1, cache_bytes=64 << 20, drain_seconds=1, **model, **log))
        tokenizer = (await (await enter(process("tokenizer", **model))).addresses())["address"]
        front = {"http_address": ANYWHERE, "tokenizer": tokenizer, "cursor_keys": KEY, "flush_ms": 0, **log}
        await engine.addresses()
        first = await enter(process("gateway", reply_partition=1, address=ANYWHERE, **front))
        address = (await first.addresses())["grpc"]
        second = await enter(process("gateway", reply_partition=2, address=ANYWHERE, **front))
        there = (await second.addresses())["grpc"]
        client = await enter(Client([address, there], patience=OFTEN))
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
            stories = [group.create_task(read(begin(client), each)) for each in begun]
            for each in begun:
                await each.wait()
            first.kill()
        assert client.address == there
        assert [story.result() for story in stories] == [published] * NUM_STREAMS
        again = await enter(process("gateway", reply_partition=1, address=address, **front))
        await again.addresses()
        async with Client(address, patience=OFTEN) as other:
            cursor = (await client.submit(token_ids=[1], max_tokens=LENGTH, temperature=0)).cursor
            assert await other.resume(cursor).read() == published
            result = await other.result(cursor)
            assert (result.complete, result.choices[0].text) == (True, published)
