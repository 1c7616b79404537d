"""The gRPC face: messages to requests, events to messages."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from holdfast import rpc
from holdfast.errors import Overloaded
from holdfast.events import Accepted, Event, Finished, FinishReason, Model, TokenLogprobs, Tokens, Usage
from holdfast.telemetry import extract
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc, generation_pb2
from services.gateway.generate import Call, Gateway
from services.gateway.settings import GatewaySettings

SERVICE = pb.DESCRIPTOR.services_by_name["GatewayService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]

REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: generation_pb2.FINISH_REASON_DEADLINE,
}


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """GatewayService, as protos/holdfast/v1/gateway.proto promises it."""

    def __init__(self, gateway: Gateway, *, write_seconds: float) -> None:
        """`write_seconds`: how long a client may leave unread what is written for it."""
        self._gateway = gateway
        self._write_seconds = write_seconds

    @rpc.unary  # as far as errors go: it writes its stream itself, each message within its time
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        async with self._gateway.generate(request, _call(context)) as answer:
            accepted = Accepted(answer.request_id, cursor=answer.cursor, prompt_tokens=answer.prompt_tokens)
            await self._write(accepted, context)
            while not answer.at_end:
                for event in await answer.next():
                    await self._write(event, context)

    @rpc.unary
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        accepted = await self._gateway.submit(request.request, _call(context, outlived=True))
        return pb.SubmitResponse(request_id=accepted.request_id, cursor=accepted.cursor)

    @rpc.unary
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        await self._gateway.cancel(request.request_id)
        return pb.CancelResponse()

    @rpc.unary
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[_model(model) for model in self._gateway.models()])

    async def _write(self, event: Event, context: Context) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await context.write(response(event))
        except TimeoutError as error:
            raise Overloaded(
                f"the client reads too slowly: it left a message unread for {self._write_seconds:g} seconds"
            ) from error


def servicer(gateway: Gateway, settings: GatewaySettings) -> rpc.Servicer:
    """The service, as a server takes it."""
    add = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
    serves = GatewayServicer(gateway, write_seconds=settings.write_seconds)
    return rpc.Servicer(name=SERVICE, add=lambda server: add(serves, server))


def _call(context: Context, *, outlived: bool = False) -> Call:
    """`outlived`: the request goes on after the call, whose deadline is not the request's."""
    metadata = context.invocation_metadata() or ()
    headers = tuple((name, value.encode() if isinstance(value, str) else value) for name, value in metadata)
    return Call("grpc", time_left=None if outlived else context.time_remaining(), trace=extract(headers))


def response(event: Event) -> pb.GenerateResponse:
    """An event as a message."""
    match event:
        case Accepted():
            accepted = pb.Accepted(request_id=event.request_id, cursor=event.cursor, prompt_tokens=event.prompt_tokens)
            return pb.GenerateResponse(accepted=accepted)
        case Tokens():
            return pb.GenerateResponse(tokens=_tokens(event))
        case Finished():
            return pb.GenerateResponse(finished=_finished(event))


def _tokens(tokens: Tokens) -> pb.Tokens:
    return pb.Tokens(
        choice=tokens.choice,
        first_index=tokens.first_index,
        num_tokens=tokens.num_tokens,
        text=tokens.text,
        token_ids=tokens.token_ids,
        logprobs=[_logprobs(each) for each in tokens.logprobs],
        cursor=tokens.cursor,
    )


def _logprobs(logprobs: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    top = [generation_pb2.TopLogprob(token_id=each.token_id, logprob=each.logprob) for each in logprobs.top]
    return generation_pb2.TokenLogprobs(logprob=logprobs.logprob, top=top)


def _finished(finished: Finished) -> pb.Finished:
    return pb.Finished(
        choice=finished.choice,
        reason=REASONS[finished.reason],
        usage=_usage(finished.usage),
        stop=finished.stop,
        cursor=finished.cursor,
    )


def _usage(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _model(model: Model) -> pb.Model:
    message = pb.Model(
        name=model.name, context_length=model.context_length, vocab_size=model.vocab_size, chat=model.chat
    )
    message.created.FromDatetime(model.created)
    return message
