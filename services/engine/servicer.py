"""The control service of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from holdfast import rpc
from holdfast.errors import DeadlineExceeded
from holdfast.v1 import engine_pb2, engine_pb2_grpc
from services.engine.loop import Load

SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """EngineService, as protos/holdfast/v1/engine.proto promises it."""

    def __init__(
        self,
        info: engine_pb2.GetInfoResponse,
        *,
        load: Callable[[], Load],
        is_draining: Callable[[], bool],
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        self._info = info
        self._load = load
        self._is_draining = is_draining
        self._drain = drain

    @rpc.unary
    async def GetInfo(self, request: engine_pb2.GetInfoRequest, context: Any) -> engine_pb2.GetInfoResponse:
        return self._info

    @rpc.unary
    async def GetLoad(self, request: engine_pb2.GetLoadRequest, context: Any) -> engine_pb2.GetLoadResponse:
        load = self._load()
        return engine_pb2.GetLoadResponse(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
            num_active_blocks=load.num_active_blocks,
            num_cached_blocks=load.num_cached_blocks,
            num_generated_tokens=load.num_generated_tokens,
            num_prefill_tokens=load.num_prefill_tokens,
            num_cached_tokens=load.num_cached_tokens,
            num_preemptions=load.num_preemptions,
            draining=self._is_draining(),
        )

    @rpc.unary
    async def Drain(self, request: engine_pb2.DrainRequest, context: Any) -> engine_pb2.DrainResponse:
        seconds = request.timeout.seconds + request.timeout.nanos / 1e9 if request.HasField("timeout") else None
        try:
            async with asyncio.timeout(seconds):
                await self._drain()
        except TimeoutError:
            raise DeadlineExceeded(f"still draining after {seconds:g} seconds; call again to wait longer") from None
        return engine_pb2.DrainResponse()


def servicer(implementation: EngineServicer) -> rpc.Servicer:
    """The service, as a server takes it."""
    add = engine_pb2_grpc.add_EngineServiceServicer_to_server
    return rpc.Servicer(name=SERVICE, add=lambda server: add(implementation, server))
