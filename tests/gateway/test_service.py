"""A gateway as a service: when it is ready, what it tells, how it ends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.trace import NoOpTracer
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from holdfast import __version__, rpc
from holdfast.errors import CannotListen, ConfigurationError, Unavailable
from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.settings import load
from holdfast.topics import TOPICS, Topic
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc
from services.gateway import http
from services.gateway.__main__ import cursor_keys, serve
from services.gateway.admission import Admission
from services.gateway.cancel import Canceller
from services.gateway.claim import Claims
from services.gateway.cursor import Cursors
from services.gateway.detokenize import Detokenizer
from services.gateway.generate import Gateway
from services.gateway.handover import Handover
from services.gateway.home import Home
from services.gateway.metrics import Metrics
from services.gateway.observation import Observer
from services.gateway.opening import Opening
from services.gateway.readiness import Readiness
from services.gateway.resume import Resumer
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Streams
from services.gateway.tails import Tails
from services.gateway.tokenizer import Tokenizer
from tests.conftest import complaints
from tests.gateway.doubles import (
    EOS,
    KEY,
    LENGTH,
    STOP,
    ByteTokenizer,
    Mesh,
    ids,
    open_mesh,
    playing_engine,
    tokenizing,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GATEWAY = "holdfast.v1.GatewayService"


async def test_a_gateway_that_is_ready_says_so_everywhere() -> None:
    """Health of the server and of the service is SERVING, /readyz and /healthz are 200, /version tells the version."""
    async with open_mesh() as mesh, rpc.channel(mesh.addresses.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", GATEWAY):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
        ready = await mesh.http.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "missing": {}})
        assert (await mesh.http.get("/healthz")).status_code == 200
        assert (await mesh.http.get("/version")).json() == {"name": "holdfast", "version": __version__}


async def test_reflection_lists_the_services() -> None:
    """A client without the contract learns what there is."""
    async with open_mesh() as mesh, rpc.channel(mesh.addresses.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        async with rpc.streaming(stub.ServerReflectionInfo(iter([question]))) as answers:
            services = {each.name for each in (await anext(aiter(answers))).list_services_response.service}
        assert {GATEWAY, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= services


async def test_a_gateway_waits_for_its_tokenizer() -> None:
    """A gateway that is started before its tokenizer is ready once that answers."""
    tokenizer, entered = ByteTokenizer(), asyncio.Event()
    async with tokenizing(tokenizer) as server:
        address = server.address

    async def gateway(bus: MemoryBus) -> None:
        async with (
            playing_engine(bus),
            serve(settings(tokenizer=address), bus=bus) as addresses,
            rpc.channel(addresses.grpc) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            entered.set()

    async with MemoryBus() as bus, asyncio.TaskGroup() as group:
        group.create_task(gateway(bus))
        await bus.create_topics(TOPICS)
        assert not entered.is_set()
        async with tokenizing(tokenizer, address=address):
            await entered.wait()


async def test_a_gateway_that_is_not_ready_says_what_is_missing() -> None:
    """Without tokenizer and log the gateway is alive, not ready, and refuses with 503 and a time to come back."""
    async with MemoryBus() as bus, rpc.channel("127.0.0.1:1") as channel:
        readiness, metrics, tokenizer = Readiness(["log", "tokenizer"]), Metrics(), Tokenizer(channel, seconds=1)
        streams = Streams(
            bus,
            reply_partition=0,
            tokenizer=tokenizer,
            detokenizer=Detokenizer(tokenizer, readiness),
            readiness=readiness,
            metrics=metrics,
        )
        tails = Tails(bus, lambda partition: streams)
        cursors = Cursors()
        opening = Opening(settings(), cursors=cursors, tails=tails, canceller=Canceller(bus))
        gateway = Gateway(
            settings(),
            bus=bus,
            tokenizer=tokenizer,
            home=Home(Claims(bus, named=None, seconds=1), tails, readiness),
            canceller=Canceller(bus),
            cursors=cursors,
            opening=opening,
            resumer=Resumer(
                settings(),
                bus=bus,
                tokenizer=tokenizer,
                tails=tails,
                opening=opening,
                cursors=cursors,
            ),
            admission=Admission(settings()),
            backlogs={},
            handover=Handover(possible=False),
            readiness=readiness,
            observer=Observer(metrics, NoOpTracer()),
        )
        app = http.application(gateway, readiness, metrics, settings())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            ready = await client.get("/readyz")
            missing = dict.fromkeys(("log", "tokenizer"), "it was not seen yet")
            assert (ready.status_code, ready.json()) == (503, {"ready": False, "missing": missing})
            assert (await client.get("/healthz")).status_code == 200
            for response in (
                await client.get("/v1/models"),
                await client.post("/v1/completions", json={"prompt": "x"}),
            ):
                assert (response.status_code, response.headers["retry-after"]) == (503, "1")
                assert "no tokenizer has answered" in response.json()["error"]["message"]
        with pytest.raises(Unavailable, match="log has not answered"):
            _ = streams.position


async def test_metrics_have_one_record_for_each_request() -> None:
    """Durations are recorded once for each request, by operation, model and error; tokens and outcomes are counted."""
    async with open_mesh() as mesh:
        async with mesh.client.generate("hi") as answer:
            await anext(answer)
            job = await mesh.engine.job()
            await mesh.engine.say(job, "ab")
            await anext(answer)
            await mesh.engine.say(job, [*ids("c"), EOS], finish=STOP, cached=1)
            await answer.read()
        async with mesh.client.generate(messages=[{"role": "user", "content": "hi"}]) as answer:
            await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
            await answer.read()
        await mesh.http.post("/v1/completions", json={"prompt": "hi", "temperature": -1})
        samples = await scrape(mesh)
        duration = "gen_ai_server_request_duration_seconds_count"
        labels = {"gen_ai_provider_name": "holdfast", "gen_ai_request_model": "bytes", "error_type": ""}
        assert samples[key(duration, gen_ai_operation_name="text_completion", **labels)] == 1
        assert samples[key(duration, gen_ai_operation_name="chat", **labels)] == 1
        refused = labels | {"gen_ai_request_model": "", "error_type": "InvalidRequest"}
        assert samples[key(duration, gen_ai_operation_name="text_completion", **refused)] == 1
        del labels["error_type"]
        labels["gen_ai_operation_name"] = "text_completion"
        assert samples[key("gen_ai_server_time_to_first_token_seconds_count", **labels)] == 1
        assert samples[key("gen_ai_server_time_per_output_token_seconds_count", **labels)] == 1
        chat = labels | {"gen_ai_operation_name": "chat"}
        assert samples[key("gen_ai_server_time_to_first_token_seconds_count", **chat)] == 1
        assert key("gen_ai_server_time_per_output_token_seconds_count", **chat) not in samples, "of one token"
        assert samples[key("holdfast_gateway_requests_total", face="grpc", outcome="finished")] == 2
        assert samples[key("holdfast_gateway_requests_total", face="http", outcome="InvalidRequest")] == 1
        counts = {kind: samples[key("holdfast_gateway_tokens_total", type=kind)] for kind in ("cached", "output")}
        assert counts == {"cached": 1, "output": 5}
        assert samples[key("holdfast_gateway_open_requests")] == 0


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def scrape(mesh: Mesh) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await mesh.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        key(sample.name, **sample.labels): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_leaving_lets_open_streams_end() -> None:
    """A gateway that is told to stop is NOT_SERVING at once, takes no new requests, and serves open streams to their end
    on both faces; until then whoever asks is told so."""
    async with (
        MemoryBus() as bus,
        tokenizing(ByteTokenizer()) as server,
        playing_engine(bus) as engine,
        httpx.AsyncClient(timeout=30) as web,
        AsyncExitStack() as channels,
        asyncio.TaskGroup() as group,
    ):

        async def read_to_the_end() -> None:
            """Reads both streams once the gateway is leaving, and then has the engine finish them."""
            assert (await anext(changes)).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Submit(pb.SubmitRequest(request=pb.GenerateRequest(prompt="hi")))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "being stopped" in str(caught.value.details())
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            ready = await web.get(f"http://{addresses.http}/readyz")
            draining = {"ready": False, "missing": {"draining": "this gateway is being stopped"}}
            assert (ready.status_code, ready.json()) == (503, draining)
            refused = await web.post(url, json={"prompt": "hi"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "being stopped" in refused.json()["error"]["message"]
            for job in jobs:
                await engine.say(job, "the end", finish=LENGTH)
            events = [response.WhichOneof("event") async for response in call]
            assert events == ["accepted", "tokens", "finished"]
            assert "the end" in (await posted).text

        async with serve(settings(tokenizer=server.address, drain_seconds=60), bus=bus) as addresses:
            channel = await channels.enter_async_context(rpc.channel(addresses.grpc))
            stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
            watch = await channels.enter_async_context(
                rpc.streaming(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
            )
            changes = aiter(watch)
            assert (await anext(changes)).status == SERVING
            call = await channels.enter_async_context(rpc.streaming(stub.Generate(pb.GenerateRequest(prompt="hi"))))
            jobs = [await engine.job()]
            url = f"http://{addresses.http}/v1/completions"
            posted = group.create_task(web.post(url, json={"prompt": "hi", "stream": True}))
            jobs.append(await engine.job())
            group.create_task(read_to_the_end())


async def test_http_listens_until_the_last_stream_has_ended() -> None:
    """Though that is one of gRPC: who balances load asks /readyz. Then it does not."""
    async with (
        MemoryBus() as bus,
        tokenizing(ByteTokenizer()) as server,
        playing_engine(bus) as engine,
        httpx.AsyncClient() as web,
        AsyncExitStack() as channels,
        asyncio.TaskGroup() as group,
    ):

        async def ask_and_end() -> None:
            while (await web.get(f"http://{addresses.http}/readyz")).status_code == 200:
                pass
            await engine.say(job, "the end", finish=LENGTH)
            assert [response.WhichOneof("event") async for response in call][-1] == "finished"

        async with serve(settings(tokenizer=server.address, drain_seconds=60), bus=bus) as addresses:
            channel = await channels.enter_async_context(rpc.channel(addresses.grpc))
            stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
            call = await channels.enter_async_context(rpc.streaming(stub.Generate(pb.GenerateRequest(prompt="hi"))))
            job = await engine.job()
            group.create_task(ask_and_end())
        with pytest.raises(httpx.ConnectError):
            await web.get(f"http://{addresses.http}/readyz")


async def test_what_does_not_end_in_time_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """After drain_seconds open streams end, and requests that live with their connection are cancelled; that is how it is
    meant to be, and no error."""
    async with (
        MemoryBus() as bus,
        tokenizing(ByteTokenizer()) as server,
        playing_engine(bus) as engine,
        AsyncExitStack() as channels,
        asyncio.TaskGroup() as group,
        httpx.AsyncClient() as web,
    ):
        async with serve(settings(tokenizer=server.address, drain_seconds=0), bus=bus) as addresses:
            channel = await channels.enter_async_context(rpc.channel(addresses.grpc))
            stub: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(channel)
            request = pb.GenerateRequest(prompt="hi", cancel_on_disconnect=True)
            call = await channels.enter_async_context(rpc.streaming(stub.Generate(request)))
            posted = group.create_task(web.post(f"http://{addresses.http}/v1/completions", json={"prompt": "hi"}))
            jobs = [await engine.job(), await engine.job()]
        assert {of_client((await engine.cancelled()).request_id) for _ in jobs} == {
            of_client(job.request.request_id) for job in jobs
        }
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        assert ((await posted).status_code, (await posted).json()["error"]["code"]) == (503, "unavailable")
    assert not complaints(caplog)


@pytest.mark.parametrize("face", ["address", "http_address"])
async def test_an_address_in_use_stops_the_start(face: str) -> None:
    """A gateway whose address is taken does not start, and names it."""
    async with MemoryBus() as bus, tokenizing(ByteTokenizer()) as server:
        with pytest.raises(CannotListen) as caught:
            async with serve(settings(tokenizer=server.address, **{face: server.address}), bus=bus):
                pass
        assert caught.value.address == server.address


async def test_a_log_with_other_topics_stops_the_start() -> None:
    """A gateway does not start on a log whose topics have another number of partitions."""
    async with MemoryBus() as bus:
        await bus.create_topics([Topic(TOPICS[0].name, 5, TOPICS[0].retention)])
        with pytest.raises(ConfigurationError, match="with 5 partitions"):
            async with serve(settings(), bus=bus):
                pass


def test_settings_are_checked() -> None:
    """A reply partition that the token topic does not have, or more choices than the contract, stop the start."""
    for flags in (["--reply-partition", "32"], ["--max-choices", "129"], ["--flush-ms", "-1"]):
        with pytest.raises(ConfigurationError, match=flags[0]):
            load(GatewaySettings, flags)
    assert load(GatewaySettings, ["--reply-partition", "31"]).reply_partition == 31


def test_keys_of_cursors_are_read_and_not_shown() -> None:
    """With commas between; where the log outlives the gateway and there are none, it says what that means."""
    given = load(GatewaySettings, ["--cursor-keys", f"{KEY}, another key of the mesh"])
    assert cursor_keys(given, kept=True) == [KEY.encode(), b"another key of the mesh"]
    assert KEY not in repr(given)
    with capture_logs() as lines:
        assert cursor_keys(settings(), kept=False) == []
        assert lines == []
        assert cursor_keys(settings(), kept=True) == []
    assert "cursor_keys is not set" in lines[0]["event"]


def settings(**given: Any) -> GatewaySettings:
    free: dict[str, Any] = {"address": "127.0.0.1:0", "http_address": "127.0.0.1:0", "drain_seconds": 0}
    return GatewaySettings(**(free | given))
