"""A gateway that plays what a test gives it, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from holdfast import rpc
from holdfast.client import GATEWAY_SERVICE, NEEDS
from holdfast.errors import Unavailable
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc, generation_pb2

Context = grpc.aio.ServicerContext[object, object]


def accepted(request_id: str = "r-1") -> pb.GenerateResponse:
    return pb.GenerateResponse(accepted=pb.Accepted(request_id=request_id, cursor="c0", prompt_tokens=3))


def tokens(first_index: int, text: str, *, num_tokens: int = 1, choice: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        tokens=pb.Tokens(choice=choice, first_index=first_index, num_tokens=num_tokens, text=text, cursor="c1")
    )


def finished(
    reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_STOP, *, choice: int = 0
) -> pb.GenerateResponse:
    usage = generation_pb2.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2)
    return pb.GenerateResponse(finished=pb.Finished(choice=choice, reason=reason, usage=usage, cursor="c2"))


def resumed(*next_index: int, ended: Sequence[int] = ()) -> pb.ResumeResponse:
    return pb.ResumeResponse(
        resumed=pb.Resumed(request_id="r-1", cursor="c1", prompt_tokens=3, next_index=next_index, ended=ended)
    )


def again(event: pb.GenerateResponse) -> pb.ResumeResponse:
    """An event as Resume tells it."""
    if event.HasField("tokens"):
        return pb.ResumeResponse(tokens=event.tokens)
    return pb.ResumeResponse(finished=event.finished)


@dataclass
class FakeGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers every request with `answer`; an exception in it is raised there. With `endless`, then goes on counting
    tokens until the call is left, which sets `left`."""

    answer: Sequence[pb.GenerateResponse | Exception] = ()
    endless: bool = False
    hold: bool = False
    """Keep the call open after the answer."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, nothing comes after the first event."""
    resumed: Sequence[Sequence[pb.ResumeResponse | Exception]] = ()
    """What Resume answers, call by call; after the last of these it refuses as a gateway that is being stopped."""
    cursors: list[str] = field(default_factory=list)
    """What Resume was asked for."""
    refusals: Sequence[Exception] = ()
    """What Submit answers, call by call, before it accepts."""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    submitted: list[pb.SubmitRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.go_on.set()

    @rpc.stream
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.timeouts.append(context.time_remaining())
        try:
            for event in self.answer:
                if isinstance(event, Exception):
                    raise event
                yield event
                await self.go_on.wait()
            if self.hold:
                await asyncio.get_running_loop().create_future()
            index = 0
            while self.endless:
                yield tokens(index, f" {index}")
                index += 1
                await asyncio.sleep(0)
        finally:
            self.left.set()

    @rpc.stream
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> AsyncIterator[pb.ResumeResponse]:
        self.cursors.append(request.cursor)
        if len(self.cursors) > len(self.resumed):
            raise Unavailable("this gateway is being stopped")
        for event in self.resumed[len(self.cursors) - 1]:
            if isinstance(event, Exception):
                raise event
            yield event

    @rpc.unary
    async def GetResult(self, request: pb.GetResultRequest, context: Context) -> pb.GetResultResponse:
        end = finished().finished
        choice = pb.ChoiceResult(text="a b", num_tokens=2, finished=end)
        return pb.GetResultResponse(request_id="r-1", prompt_tokens=3, choices=[choice], complete=True)

    @rpc.unary
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        self.submitted.append(request)
        if self.refusals:
            error, *self.refusals = self.refusals
            raise error
        return pb.SubmitResponse(request_id=request.request.request_id, cursor="c0")

    @rpc.unary
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self.cancelled.append(request.request_id)
        return pb.CancelResponse()

    @rpc.unary
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        model = pb.Model(name="tiny", context_length=512, vocab_size=1000, chat=True)
        model.created.FromSeconds(1_700_000_000)
        return pb.ListModelsResponse(models=[model])


@asynccontextmanager
async def serving(gateway: FakeGateway) -> AsyncIterator[rpc.Server]:
    """The fake on a free port; not healthy until it says so, though it has all that it needs."""
    add = rpc.Servicer(GATEWAY_SERVICE, lambda s: gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, s))
    async with rpc.serving("127.0.0.1:0", [add], drain=0) as server:
        await server.health.needs(dict.fromkeys(NEEDS, True))
        yield server
