"""What a gateway says while the log, or every engine, is gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdfast import rpc
from holdfast.bus import Headers, Lag, TopicPartition
from holdfast.client import NEEDS
from holdfast.errors import Overloaded, Unavailable
from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.topics import ENGINES, REQUESTS_INTERACTIVE, TOPICS, Topic
from services.gateway.readiness import NOT_YET, Readiness
from services.gateway.watch import NO_ENGINE, Watch
from tests.gateway.doubles import LENGTH, Mesh, open_mesh


class Log(MemoryBus):
    """A log that can be out of reach: then it answers nothing and takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()
        self.reached.set()
        self.asked = asyncio.Event()
        """Set by the question for engines."""

    async def group_members(self, group: str) -> dict[str, frozenset[TopicPartition]]:
        self.asked.set()
        await self.reached.wait()
        return await super().group_members(group)

    async def publish(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> int:
        await self.reached.wait()
        return await super().publish(partition, value, key=key, headers=headers)


async def ready(mesh: Mesh, *, missing: dict[str, str]) -> None:
    """Returns once /readyz and health both say so, health of each need too."""
    async with rpc.channel(mesh.addresses.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while (answer := await mesh.http.get("/readyz")).json() != {"ready": not missing, "missing": missing}:
            pass
        assert answer.status_code == (503 if missing else 200)
        serving = health_pb2.HealthCheckResponse.NOT_SERVING if missing else health_pb2.HealthCheckResponse.SERVING
        while (await health.Check(health_pb2.HealthCheckRequest())).status != serving:
            pass
    while await mesh.client.needs() != {need: need not in missing for need in NEEDS}:
        pass


async def test_a_gateway_is_not_ready_before_an_engine_was_seen() -> None:
    """Log and tokenizer are there, but nobody knows yet whether somebody would answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    log = Log()
    async with asyncio.TaskGroup() as group:

        async def ask() -> None:
            await log.asked.wait()
            async with httpx.AsyncClient() as web:
                answer = await web.get(f"http://{free}/readyz")
                assert (answer.status_code, answer.json()["missing"]) == (503, {"engine": NOT_YET})
            log.reached.set()

        log.reached.clear()
        group.create_task(ask())
        async with open_mesh(log=log, http_address=free, log_seconds=60) as mesh:
            await ready(mesh, missing={})


async def test_a_log_that_does_not_answer_is_missing_until_it_does() -> None:
    """A request that comes meanwhile is refused at once, on both faces; a stream that is open waits, and goes on."""
    log = Log()
    async with (
        open_mesh(log=log, watch_seconds=0.01, log_seconds=0.05) as mesh,
        mesh.client.generate("hi") as answer,
    ):
        await anext(answer)
        job = await mesh.engine.job()
        log.reached.clear()
        await ready(mesh, missing={"log": "it did not answer within 0.05 seconds"})
        with pytest.raises(Unavailable, match="the log is missing: it did not answer within"):
            await mesh.client.submit("hi")
        refused = await mesh.http.post("/v1/completions", json={"prompt": "hi"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        log.reached.set()
        await ready(mesh, missing={})
        await mesh.client.submit("hi")
        await mesh.engine.say(job, "x", finish=LENGTH)
        assert await answer.read() == "x"


async def test_a_log_that_takes_no_record_in_time_may_not_have_accepted_it() -> None:
    """UNAVAILABLE after log_seconds, before anybody noticed that the log is gone; and if the log has the request all the
    same, it is cancelled."""
    log = Log()
    async with open_mesh(log=log, log_seconds=0.05, watch_seconds=3600) as mesh:
        log.reached.clear()
        with pytest.raises(
            Unavailable, match=r"did not take the request within 0\.05 seconds; it may not have been accepted"
        ):
            await mesh.client.submit("hi", request_id="r-1")
        log.reached.set()
        assert of_client((await mesh.engine.cancelled()).request_id) == "r-1"


async def test_what_the_log_says_of_itself_is_told() -> None:
    """The reason, and nothing of engines."""
    readiness = Readiness([])
    async with MemoryBus() as bus:
        watch = watching(bus, readiness)
    await watch.look()
    assert readiness.missing == {"log": "the in-memory log is closed"}


class Reticent(MemoryBus):
    """A log that does not say how far anybody is behind."""

    num_asked = 0

    async def lag(self, group: str, topics: Sequence[Topic]) -> dict[TopicPartition, Lag]:
        self.num_asked += 1
        raise Unavailable("a partition has no leader")


async def test_a_log_that_does_not_say_what_waits_takes_requests() -> None:
    """What was known before has to do; so many may wait as ever."""
    log = Reticent()
    async with open_mesh(log=log, watch_seconds=0.01, max_waiting=2) as mesh:
        for _ in range(2):
            await mesh.client.submit("hi")
        with pytest.raises(Overloaded):
            await mesh.client.submit("hi")
        await ready(mesh, missing={})
        assert log.num_asked > 0


async def test_without_an_engine_a_gateway_is_not_ready() -> None:
    """From its start, and whenever the last one has left; what it accepts meanwhile waits in the log."""
    readiness = Readiness([])
    async with MemoryBus() as bus, AsyncExitStack() as engine:
        await bus.create_topics(TOPICS)
        watch = watching(bus, readiness)
        await watch.look()
        assert readiness.missing == {"engine": NO_ENGINE}
        await engine.enter_async_context(bus.join(ENGINES, [REQUESTS_INTERACTIVE]))
        await watch.look()
        assert readiness.missing == {}
        await engine.aclose()
        await watch.look()
        assert readiness.missing == {"engine": NO_ENGINE}


async def test_a_gateway_accepts_requests_though_no_engine_is_there() -> None:
    """They are answered once one is."""
    log = Log()
    async with open_mesh(log=log, watch_seconds=0.01) as mesh:
        (member,) = log.members(ENGINES)
        with log.frozen(member):
            await ready(mesh, missing={"engine": NO_ENGINE})
            async with mesh.client.generate("hi") as answer:
                await anext(answer)
                await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
                assert await answer.read() == "x"


def watching(bus: MemoryBus, readiness: Readiness, **given: Any) -> Watch:
    return Watch(bus, readiness, {}, **{"every": 1.0, "seconds": 60.0} | given)
