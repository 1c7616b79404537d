"""Servers, channels and the translation of errors, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from holdfast import rpc
from holdfast.errors import ConfigurationError, Overloaded, from_rpc_error
from holdfast.v1 import engine_pb2, gateway_pb2, gateway_pb2_grpc

NAME = "holdfast.v1.GatewayService"


class Counting(gateway_pb2_grpc.GatewayServiceServicer):
    """A gateway that counts without end and remembers whether it was left alone."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    @rpc.stream
    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        try:
            index = 0
            while True:
                yield gateway_pb2.GenerateResponse(tokens=gateway_pb2.Tokens(first_index=index, num_tokens=1))
                index += 1
                await asyncio.sleep(0)
        finally:
            self.ended.set()

    @rpc.unary
    async def Cancel(
        self, request: gateway_pb2.CancelRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> gateway_pb2.CancelResponse:
        raise Overloaded("no room", retry_after=3)

    @rpc.unary
    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> gateway_pb2.ListModelsResponse:
        raise KeyError("a secret")


@asynccontextmanager
async def counting() -> AsyncIterator[tuple[Counting, rpc.Server, grpc.aio.Channel]]:
    servicer = Counting()
    add = rpc.Servicer(NAME, lambda server: gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server))
    async with rpc.serving("127.0.0.1:0", [add], drain=0) as server, rpc.channel(server.address) as channel:
        yield servicer, server, channel


async def test_a_stream_that_the_client_leaves_ends_on_the_server() -> None:
    """Leaving the block cancels the call, which grpcio itself does not do for an abandoned one (grpc/grpc#43462)."""
    async with counting() as (servicer, _, channel):
        async with rpc.streaming(
            gateway_pb2_grpc.GatewayServiceStub(channel).Generate(gateway_pb2.GenerateRequest())
        ) as call:
            async for response in call:
                if response.tokens.first_index == 10:
                    break
            assert not servicer.ended.is_set()
        await asyncio.wait_for(servicer.ended.wait(), 10)


async def test_our_errors_become_statuses_with_details() -> None:
    """The servicer raises; the client reads status, text and time to wait."""
    async with counting() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway_pb2_grpc.GatewayServiceStub(channel).Cancel(gateway_pb2.CancelRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(caught.value)
    assert isinstance(error, Overloaded)
    assert error.retry_after == 3


async def test_other_errors_keep_their_text_to_themselves() -> None:
    """A fault of ours is INTERNAL, and what it says goes to the log alone."""
    async with counting() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway_pb2_grpc.GatewayServiceStub(channel).ListModels(gateway_pb2.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (caught.value.details() or "")


async def test_a_server_is_healthy_once_it_says_so() -> None:
    """NOT_SERVING until ready; by name and in whole."""
    async with counting() as (_, server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.health.ready()
        for name in ("", NAME):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_channel_goes_to_several_servers_in_turns() -> None:
    """Given as numbers with commas between. Among names that would lead nowhere, and is refused."""
    async with (
        counting() as (_, one, _),
        counting() as (_, two, _),
        rpc.channel(f"{one.address},{two.address}") as both,
    ):
        await one.health.ready()
        stub, seen = health_pb2_grpc.HealthStub(both), set()
        while len(seen) < 2:
            seen.add((await stub.Check(health_pb2.HealthCheckRequest(service=NAME), wait_for_ready=True)).status)
    with pytest.raises(ConfigurationError, match="give several as 10.0.0.1:50052,10.0.0.2:50052, or one name"):
        rpc.channel("tokenizer-0:50052,tokenizer-1:50052")


async def test_what_a_server_needs_has_a_health_of_its_own() -> None:
    """By name, whatever the server says of itself; what it does not need is no service of it."""
    async with counting() as (_, server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        await server.health.needs({"log": True, "engine": False})
        for name, status in (("log", "SERVING"), ("engine", "NOT_SERVING"), (NAME, "NOT_SERVING")):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == status
        with pytest.raises(grpc.aio.AioRpcError, match="no service 'moon' here"):
            await stub.Check(health_pb2.HealthCheckRequest(service="moon"))


async def test_a_watch_tells_every_change_and_ends_with_the_server() -> None:
    """A watch tells how the service stands and what changes. Its last word is NOT_SERVING when the server leaves, which
    therefore does not wait for it until the limit of its drain."""
    status = health_pb2.HealthCheckResponse
    nothing = rpc.Servicer(NAME, add=lambda server: None)
    told = asyncio.Queue[int]()

    async def watch(address: str) -> None:
        async with rpc.channel(address) as channel:
            question = health_pb2.HealthCheckRequest(service=NAME)
            async with rpc.streaming(health_pb2_grpc.HealthStub(channel).Watch(question)) as changes:
                async for change in changes:
                    told.put_nowait(change.status)

    async with asyncio.TaskGroup() as group:
        async with rpc.serving("127.0.0.1:0", [nothing], drain=3600) as server:
            watching = group.create_task(watch(server.address))
            assert await told.get() == status.NOT_SERVING
            await server.health.ready()
            assert await told.get() == status.SERVING
        await watching
        assert told.get_nowait() == status.NOT_SERVING


async def test_an_unknown_service_is_not_found_and_watched_as_unknown() -> None:
    """Asked for a service that is not here, Check says NOT_FOUND and Watch SERVICE_UNKNOWN."""
    async with counting() as (_, _, channel):
        stub, question = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service="other")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(question)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        async with rpc.streaming(stub.Watch(question)) as changes:
            assert (await anext(aiter(changes))).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_a_server_tells_what_it_offers() -> None:
    """Reflection lists the services."""
    async with counting() as (_, server, _):

        def services() -> list[str]:
            with grpc.insecure_channel(server.address) as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert NAME in await asyncio.to_thread(services)


async def test_an_address_in_use_is_an_error() -> None:
    """Two servers never share a port by mistake."""
    async with counting() as (_, server, _):
        with pytest.raises(ConfigurationError, match=str(server.port)):
            async with rpc.serving(server.address, [], drain=0):
                pass


async def test_a_message_over_the_limit_is_refused_with_its_size() -> None:
    """100 MB do not enter."""
    async with counting() as (_, _, channel):
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(
            gateway_pb2.GenerateRequest(prompt="x" * (100 << 20))
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with rpc.streaming(call):
                async for _ in call:
                    pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (caught.value.details() or "")


def test_messages_of_the_contract_import_together() -> None:
    """The generated modules share one descriptor pool."""
    assert engine_pb2.DESCRIPTOR.package == gateway_pb2.DESCRIPTOR.package == "holdfast.v1"


async def test_a_message_that_cannot_be_read_is_the_callers_fault() -> None:
    """A string that is not UTF-8, which no protobuf library writes, is answered with INVALID_ARGUMENT, for both kinds of
    handlers."""
    not_utf_8 = b"\x0a\x02\xff\xfe"
    async with counting() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be read.*CancelRequest") as caught:
            await channel.unary_unary(f"/{NAME}/Cancel")(not_utf_8)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be read.*GenerateRequest") as caught:
            await channel.unary_stream(f"/{NAME}/Generate")(not_utf_8).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
