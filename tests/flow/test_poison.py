"""A request that kills every engine that computes it: the fleet outlives it, and so do all other streams."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.client import Client
from holdfast.dead import dead_letters
from holdfast.errors import StreamFailed
from holdfast.kafka import KafkaBus
from holdfast.ownership import MAX_STARTS
from tests.flow.mesh import ANYWHERE, PATIENCE, process
from tests.flow.mortal_engine import POISON

LENGTH = 199
"""Tokens of the published text."""


class Fleet:
    """Two engine processes, each with another one in its place whenever it dies."""

    def __init__(self, **settings: object) -> None:
        self._settings = settings
        self.num_deaths = 0
        self.ready = asyncio.Semaphore(0)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in ("first", "second"):
                tasks.create_task(self._keep(name))

    async def _keep(self, name: str) -> None:
        while True:
            async with process("tests.flow.mortal_engine", name=name, **self._settings) as engine:
                await engine.addresses()
                self.ready.release()
                await engine.child.wait()
            self.num_deaths += 1


@pytest.mark.kafka
@pytest.mark.timeout(400)
async def test_a_prompt_that_kills_engines_is_given_up_and_all_others_are_answered(
    kafka: str, stories260k: Path, published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that are gone from one moment to the next, as by a segmentation fault. The prompt comes in the middle of
    other streams; after few deaths it ends with an error, and `holdfast dead` names it."""
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    log = {"kafka": kafka, "kafka_namespace": namespace}
    model = {"model": stories260k, "address": ANYWHERE}
    fleet = Fleet(threads=1, cache_bytes=64 << 20, drain_seconds=0, **model, **log)
    async with AsyncExitStack() as parts, asyncio.TaskGroup() as tasks:
        enter = parts.enter_async_context
        living = tasks.create_task(fleet.run())
        tokenizer = (await (await enter(process("tokenizer", **model))).addresses())["address"]
        front = {"address": ANYWHERE, "http_address": ANYWHERE, "tokenizer": tokenizer, "drain_seconds": 1}
        gateway = await enter(process("gateway", **front, **log))
        client = await enter(Client((await gateway.addresses())["grpc"]))
        async with asyncio.timeout(PATIENCE):
            for _ in range(2):
                await fleet.ready.acquire()

        def story() -> asyncio.Task[str]:
            answer = client.generate(token_ids=[1], max_tokens=LENGTH, temperature=0, timeout=360)
            return tasks.create_task(answer.read())

        stories = [story() for _ in range(6)]
        poison = client.generate(token_ids=list(POISON), max_tokens=LENGTH, request_id="poison")
        reading = tasks.create_task(read_failure(poison.read()))
        stories += [story() for _ in range(6)]
        assert "given up: 3 engines began this request" in await reading
        assert await asyncio.gather(*stories) == [published] * 12
        assert MAX_STARTS <= fleet.num_deaths <= MAX_STARTS + 1
        living.cancel()
    async with KafkaBus(kafka, namespace=namespace) as bus:
        (letter,) = await dead_letters(bus)
    assert tuple(letter.request.prompt_token_ids) == POISON and len(letter.epochs) == MAX_STARTS
    told = await asyncio.to_thread(main, ["dead", "--kafka", kafka, "--kafka-namespace", namespace])
    assert told == 0 and "poison: given up" in capsys.readouterr().out


async def read_failure(answer: asyncio.Future[str]) -> str:
    """What a stream says that fails."""
    with pytest.raises(StreamFailed) as raised:
        await answer
    return str(raised.value)
