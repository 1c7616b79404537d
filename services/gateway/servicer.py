"""The gRPC face: messages to requests, events to messages."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from holdfast import rpc
from holdfast.errors import InvalidRequest, Overloaded
from holdfast.events import Accepted, ChoiceResult, Finished, Model, Resumed, TokenLogprobs, Tokens, Usage
from holdfast.telemetry import extract
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1 import gateway_pb2_grpc, generation_pb2
from services.gateway.cursor import TO_WIRE
from services.gateway.generate import Call, Gateway
from services.gateway.handover import Moves
from services.gateway.settings import GatewaySettings

SERVICE = pb.DESCRIPTOR.services_by_name["GatewayService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """GatewayService, as protos/holdfast/v1/gateway.proto promises it."""

    def __init__(self, gateway: Gateway, *, write_seconds: float) -> None:
        """`write_seconds`: how long a client may leave unread what is written for it."""
        self._gateway = gateway
        self._write_seconds = write_seconds

    @rpc.unary  # as far as errors go: it writes its stream itself, each message within its time
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        async with self._gateway.generate(request, _call(context, hand_over=request.hand_over)) as answer:
            accepted = Accepted(answer.request_id, cursor=answer.cursor, prompt_tokens=answer.prompt_tokens)
            await self._write(response(accepted), context)
            while not answer.at_end:
                for event in await answer.next():
                    await self._write(response(event), context)

    @rpc.unary  # as Generate
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:
        async with self._gateway.resume(request.cursor, _call(context, hand_over=request.hand_over)) as resumption:
            answer = resumption.answer
            await self._write(resumed_response(resumption.resumed), context)
            while not answer.at_end:
                for event in await answer.next():
                    await self._write(resumed_response(event), context)

    @rpc.unary
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        accepted = await self._gateway.submit(request.request, _call(context, outlived=True))
        return pb.SubmitResponse(request_id=accepted.request_id, cursor=accepted.cursor)

    @rpc.unary
    async def GetResult(self, request: pb.GetResultRequest, context: Context) -> pb.GetResultResponse:
        wait = request.wait.ToNanoseconds() / 1e9 if request.HasField("wait") else None
        if wait is not None and wait <= 0:
            raise InvalidRequest(f"wait must be above 0 seconds, not {wait:g}", field="wait")
        call = _call(context, hand_over=request.hand_over)
        result = await self._gateway.result(request.cursor, call, wait=wait)
        return pb.GetResultResponse(
            request_id=result.request_id,
            prompt_tokens=result.prompt_tokens,
            choices=[_choice_result(choice) for choice in result.choices],
            complete=result.complete,
        )

    @rpc.unary
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        await self._gateway.cancel(request.request_id, request.cursor)
        return pb.CancelResponse()

    @rpc.unary
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[_model(model) for model in self._gateway.models()])

    async def _write(self, message: pb.GenerateResponse | pb.ResumeResponse, context: Context) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await context.write(message)
        except TimeoutError as error:
            raise Overloaded(
                f"the client reads too slowly: it left a message unread for {self._write_seconds:g} seconds"
            ) from error


def servicer(gateway: Gateway, settings: GatewaySettings) -> rpc.Servicer:
    """The service, as a server takes it."""
    add = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
    serves = GatewayServicer(gateway, write_seconds=settings.write_seconds)
    return rpc.Servicer(name=SERVICE, add=lambda server: add(serves, server))


def _call(context: Context, *, outlived: bool = False, hand_over: bool = False) -> Call:
    """`outlived`: the request goes on after the call, whose deadline is not the request's. `hand_over`: whoever calls goes
    on elsewhere by itself."""
    metadata = context.invocation_metadata() or ()
    headers = tuple((name, value.encode() if isinstance(value, str) else value) for name, value in metadata)
    return Call(
        "grpc",
        time_left=None if outlived else context.time_remaining(),
        trace=extract(headers),
        moves=Moves.AT_ONCE if hand_over else Moves.LATE,
    )


def response(event: Accepted | Tokens | Finished) -> pb.GenerateResponse:
    """An event of Generate as a message."""
    match event:
        case Accepted():
            accepted = pb.Accepted(request_id=event.request_id, cursor=event.cursor, prompt_tokens=event.prompt_tokens)
            return pb.GenerateResponse(accepted=accepted)
        case Tokens():
            return pb.GenerateResponse(tokens=_tokens(event))
        case Finished():
            return pb.GenerateResponse(finished=_finished(event))


def resumed_response(event: Resumed | Tokens | Finished) -> pb.ResumeResponse:
    """An event of Resume as a message."""
    match event:
        case Resumed():
            resumed = pb.Resumed(
                request_id=event.request_id,
                cursor=event.cursor,
                prompt_tokens=event.prompt_tokens,
                next_index=event.next_index,
                ended=event.ended,
            )
            return pb.ResumeResponse(resumed=resumed)
        case Tokens():
            return pb.ResumeResponse(tokens=_tokens(event))
        case Finished():
            return pb.ResumeResponse(finished=_finished(event))


def _choice_result(choice: ChoiceResult) -> pb.ChoiceResult:
    return pb.ChoiceResult(
        text=choice.text,
        num_tokens=choice.num_tokens,
        token_ids=choice.token_ids,
        logprobs=[_logprobs(each) for each in choice.logprobs],
        finished=_finished(choice.finished) if choice.finished is not None else None,
    )


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
        reason=TO_WIRE[finished.reason],
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
