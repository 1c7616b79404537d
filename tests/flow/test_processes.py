"""The mesh as it is deployed: each service a process of its own, Kafka between them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from holdfast import rpc
from holdfast.client import Client
from holdfast.events import Finished, FinishReason, Tokens
from holdfast.v1 import engine_pb2_grpc
from services.gateway.watch import NO_ENGINE
from tests.flow.mesh import ANYWHERE, PATIENCE, Engine, Process, is_idle, process

LENGTH = 199
"""Tokens of the published text."""

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


@dataclass(frozen=True, slots=True)
class Processes:
    """A gateway, a tokenizer, and two engines that share the work."""

    client: Client
    gateway: Process
    tokenizer: Process
    engines: list[tuple[Process, Engine]]
    log: dict[str, str]
    """Flags that make one more service a part of it."""


@pytest.fixture
async def mesh(kafka: str, stories260k: Path) -> AsyncIterator[Processes]:
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        log = {"kafka": kafka, "kafka_namespace": f"test-{uuid.uuid4().hex[:12]}"}
        options = {"model": stories260k, "address": ANYWHERE}
        few = {"threads": 1, "cache_bytes": 64 << 20, "drain_seconds": 1}
        started = [
            await enter(process("engine", name=f"engine-{number}", **options, **few, **log)) for number in (1, 2)
        ]
        tokenizer = await enter(process("tokenizer", **options))
        at_tokenizer = {"tokenizer": (await tokenizer.addresses())["address"]}
        addresses = {"address": ANYWHERE, "http_address": ANYWHERE, "drain_seconds": 1}
        gateway = await enter(process("gateway", **addresses, **at_tokenizer, **log))
        client = await enter(Client((await gateway.addresses())["grpc"]))
        engines = []
        for engine in started:
            channel = await enter(rpc.channel((await engine.addresses())["address"]))
            engines.append((engine, Engine(engine_pb2_grpc.EngineServiceStub(channel))))
        yield Processes(client=client, gateway=gateway, tokenizer=tokenizer, engines=engines, log=log)


async def story(client: Client) -> str:
    return await client.generate(token_ids=[1], max_tokens=LENGTH, temperature=0, timeout=120).read()


async def test_four_processes_stream_the_published_text_and_engines_share_the_work(
    mesh: Processes, published: str
) -> None:
    """Both engines generate. SIGTERM then ends each service with success."""
    stories = await asyncio.gather(*(story(mesh.client) for _ in range(16)))
    assert stories == [published] * 16
    generated = [(await engine.load()).num_generated_tokens for _, engine in mesh.engines]
    assert all(count > 0 for count in generated)
    assert sum(generated) >= 16 * LENGTH  # more where a busy machine made the group rebalance
    for part in (mesh.gateway, *(engine for engine, _ in mesh.engines), mesh.tokenizer):
        assert await part.stop() == 0


async def listen(client: Client, max_tokens: int = LENGTH, request_id: str = "") -> str:
    """A story, its tokens counted. The client itself proves that there is no gap and no duplicate."""
    text, num_tokens = "", 0
    async with client.generate(
        token_ids=[1], max_tokens=max_tokens, temperature=0, timeout=120, request_id=request_id
    ) as answer:
        async for event in answer:
            if isinstance(event, Tokens):
                text += event.text
                num_tokens += event.num_tokens
            if isinstance(event, Finished):
                assert (event.reason, num_tokens) == (FinishReason.LENGTH, max_tokens)
    return text


async def test_streams_survive_an_engine_that_freezes_and_one_that_dies(mesh: Processes, published: str) -> None:
    """In the middle of its streams, without a word: the other engine takes over its partitions, and every stream goes on
    to its end without a gap, a duplicate or a different token. What an engine says that was frozen meanwhile, and woke,
    is ignored."""
    (first, first_engine), (second, second_engine) = mesh.engines

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(listen(mesh.client)) for _ in range(32)]
        await first_engine.until(lambda load: load.num_running > 0)
        first.freeze()
    assert [stream.result() for stream in streams] == [published] * 32

    first.wake()
    stories = await asyncio.gather(*(listen(mesh.client) for _ in range(8)))
    assert stories == [published] * 8

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(listen(mesh.client)) for _ in range(32)]
        await second_engine.until(lambda load: load.num_running > 0)
        second.kill()
    assert [stream.result() for stream in streams] == [published] * 32
    assert (await first_engine.load()).num_generated_tokens > 0


async def test_an_id_that_two_gateways_were_given_is_two_requests_even_where_an_engine_dies(
    mesh: Processes, published: str
) -> None:
    """Sixteen ids, each at both of them for a text of another length: each client reads its own to the end. Neither
    gateway can know what the other accepted, and whoever takes the requests over reads them in any order."""
    (_, survivor), (doomed, engine) = mesh.engines
    tokenizer = (await mesh.tokenizer.addresses())["address"]
    async with (
        process(
            "gateway", address=ANYWHERE, http_address=ANYWHERE, tokenizer=tokenizer, drain_seconds=1, **mesh.log
        ) as beside,
        Client((await beside.addresses())["grpc"]) as client,
        asyncio.TaskGroup() as tasks,
    ):
        names = [f"story-{number}" for number in range(16)]
        whole = [tasks.create_task(listen(mesh.client, request_id=name)) for name in names]
        half = [tasks.create_task(listen(client, LENGTH // 2, request_id=name)) for name in names]
        await engine.until(lambda load: load.num_running > 0)
        doomed.kill()
    assert [stream.result() for stream in whole] == [published] * 16
    beginnings = {stream.result() for stream in half}
    assert len(beginnings) == 1
    assert published.startswith(beginnings.pop())
    await survivor.until(is_idle)


async def missing(mesh: Processes) -> dict[str, str]:
    """What the gateway says that it lacks."""
    async with httpx.AsyncClient() as http:
        answer = (await http.get(f"http://{(await mesh.gateway.addresses())['http']}/readyz")).json()["missing"]
    assert isinstance(answer, dict)
    return answer


async def test_a_gateway_is_ready_while_one_engine_is_there(mesh: Processes) -> None:
    """When the last one has left it says so; what it accepts then waits in the log."""
    (first, _), (second, _) = mesh.engines
    async with asyncio.timeout(PATIENCE):
        while await missing(mesh):
            pass
        assert await first.stop() == 0
        await story(mesh.client)
        assert await missing(mesh) == {}
        assert await second.stop() == 0
        while await missing(mesh) != {"engine": NO_ENGINE}:
            pass
        assert (await mesh.client.submit("Once")).request_id
