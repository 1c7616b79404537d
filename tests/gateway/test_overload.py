"""What a client sees while more waits in the log than may."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from holdfast.committed import Committed
from holdfast.errors import Overloaded
from holdfast.topics import ENGINES, REQUESTS_INTERACTIVE
from holdfast.v1 import gateway_pb2 as pb
from services.gateway.backlog import UNKNOWN_SECONDS
from tests.gateway.doubles import LENGTH, Mesh, open_face, open_mesh

SOON = 20.0


async def engine_began_all(mesh: Mesh) -> None:
    """An engine has taken what waits, and says so where it commits."""
    (member,) = mesh.bus.members(ENGINES)
    await member.read(max_records=100, timeout=0)
    ends = {partition: lag.end for partition, lag in (await mesh.bus.lag(ENGINES, [REQUESTS_INTERACTIVE])).items()}
    await member.commit({partition: Committed(0, end).position() for partition, end in ends.items()})


async def accepted(mesh: Mesh) -> None:
    """Returns once the gateway takes a request again."""
    async with asyncio.timeout(SOON):
        while True:
            try:
                await mesh.client.submit("hi")
            except Overloaded:
                continue
            return


async def test_a_refusal_says_when_to_come_back() -> None:
    """RESOURCE_EXHAUSTED with RetryInfo over gRPC, 429 with Retry-After over HTTP, `Overloaded.retry_after` from the client;
    and no prompt is tokenized for it."""
    async with open_mesh(max_waiting=2, watch_seconds=3600) as mesh:
        for _ in range(2):
            await mesh.client.submit("hi")
        mesh.tokenizer.asked.clear()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.stub.Submit(pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi")))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = rpc_status.from_call(caught.value).details
        info = error_details_pb2.RetryInfo()
        assert [each.Unpack(info) for each in details].count(True) == 1
        assert UNKNOWN_SECONDS / 2 <= info.retry_delay.ToMilliseconds() / 1000 <= UNKNOWN_SECONDS

        response = await mesh.http.post("/v1/completions", json={"prompt": "hi"})
        assert response.status_code == 429
        assert UNKNOWN_SECONDS / 2 <= int(response.headers["retry-after"]) <= UNKNOWN_SECONDS
        assert response.json()["error"]["code"] == "overloaded"

        with pytest.raises(
            Overloaded, match="2 interactive requests wait for an engine, and no more than 2"
        ) as refused:
            await mesh.client.generate("hi").read()
        assert UNKNOWN_SECONDS / 2 <= refused.value.retry_after <= UNKNOWN_SECONDS
        assert f"try again in {refused.value.retry_after:.0f} seconds" in str(refused.value)
        assert not mesh.tokenizer.asked.is_set()


async def test_classes_have_a_backlog_each() -> None:
    """Where interactive requests are refused batch ones are not, and the other way round."""
    async with open_mesh(max_waiting=1, watch_seconds=3600) as mesh:
        await mesh.client.submit("hi")
        await mesh.client.submit("hi", request_class="batch")
        with pytest.raises(Overloaded, match="1 interactive requests"):
            await mesh.client.submit("hi")
        with pytest.raises(Overloaded, match="1 batch requests"):
            await mesh.client.submit("hi", request_class="batch")


async def test_what_runs_does_not_wait() -> None:
    """Once an engine has taken what waited, others are let in; nobody has to be told."""
    async with open_mesh(max_waiting=2, watch_seconds=0.01) as mesh:
        for _ in range(2):
            await mesh.client.submit("hi")
        with pytest.raises(Overloaded):
            await mesh.client.submit("hi")
        await engine_began_all(mesh)
        await accepted(mesh)


async def test_an_answer_that_ends_makes_room() -> None:
    """At once, before the log is asked again: its place is another's."""
    async with open_mesh(max_waiting=1, watch_seconds=3600) as mesh:
        async with mesh.client.generate("hi") as answer:
            await anext(answer)
            with pytest.raises(Overloaded):
                await mesh.client.submit("hi")
            await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
            assert await answer.read() == "x"
        await accepted(mesh)


async def test_a_client_that_leaves_makes_no_room() -> None:
    """Nor a deadline that passed here alone: the request waits on in the log, and no engine has said a word."""
    async with open_mesh(max_waiting=1, watch_seconds=3600) as mesh:
        async with mesh.client.generate("hi", cancel_on_exit=False) as answer:
            await anext(answer)
        async with asyncio.timeout(SOON):
            while "holdfast_gateway_open_requests 0.0" not in (await mesh.http.get("/metrics")).text.splitlines():
                pass
        with pytest.raises(Overloaded):
            await mesh.client.submit("hi")
    async with open_mesh(max_waiting=1, watch_seconds=3600) as mesh:
        await mesh.client.generate("hi", timeout=0.05).read()
        with pytest.raises(Overloaded):
            await mesh.client.submit("hi")


async def test_other_gateways_requests_wait_too() -> None:
    """A gateway that starts knows of what was there before."""
    async with open_mesh(watch_seconds=3600) as mesh:
        for _ in range(5):
            await mesh.client.submit("hi")
        async with open_face(mesh.bus, mesh.tokenizer_address, reply_partition=1, max_waiting=5) as second:
            with pytest.raises(Overloaded, match="5 interactive requests wait for an engine"):
                await second.client.submit("hi")


async def test_metrics_tell_of_the_backlog() -> None:
    """What waits, for how long a new one would, and the refusals by their reason."""
    async with open_mesh(max_waiting=1, max_streams=1, watch_seconds=3600) as mesh:
        await mesh.client.submit("hi")
        with pytest.raises(Overloaded):
            await mesh.client.submit("hi")
        async with mesh.client.generate("hi", request_class="batch") as answer:
            await anext(answer)
            with pytest.raises(Overloaded):
                await mesh.client.submit("hi")
            shown = (await mesh.http.get("/metrics")).text.splitlines()
    for line in (
        'holdfast_gateway_waiting_requests{request_class="interactive"} 1.0',
        'holdfast_gateway_estimated_wait_seconds{request_class="interactive"} NaN',
        'holdfast_gateway_refused_requests_total{reason="waiting"} 1.0',
        'holdfast_gateway_refused_requests_total{reason="streams"} 1.0',
        'holdfast_gateway_refused_requests_total{reason="wait"} 0.0',
    ):
        assert line in shown
