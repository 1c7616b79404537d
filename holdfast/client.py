"""The async client of a gateway.

    async with Client("127.0.0.1:50051") as client:
        async with client.generate(messages=[{"role": "user", "content": "Why is the sky blue?"}]) as answer:
            async for text in answer.text():
                print(text, end="", flush=True)

An answer is an iterator of events (`holdfast.events`); `text` and `read` show it as text. It has three ends, and says
which: the iteration ends (finished), it is left (closed by you, which cancels the request or not, as asked), or it
raises one of `holdfast.errors` (broken). Every event is checked against those before it: a token that is missing or
comes twice is an error, never a silent gap.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self, TypedDict, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from holdfast import rpc
from holdfast.errors import Cancelled, InvalidRequest, StreamFailed, Unavailable, from_rpc_error
from holdfast.events import Accepted, Event, Finished, Model, Submitted, Tokens, event_from_wire, model_from_wire
from holdfast.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2, tokenizer_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Where a gateway listens unless it is told otherwise."""

GATEWAY_SERVICE = "holdfast.v1.GatewayService"

NEEDS = ("log", "tokenizer", "engine")
"""What a gateway needs to serve: the names under which its health tells whether each is there."""

_LATE = 5.0
"""Seconds that a call may outlive the deadline of its request: the gateway ends the answer, not the connection."""


Message = Mapping[str, object]
"""One message of a conversation: `role`, `content`, and what else the model's template reads."""


class Options(TypedDict, total=False):
    """What may be said about a request beside its input. What is left out, or None, is the mesh's to choose; the
    ranges are those of `protos/holdfast/v1/generation.proto`."""

    template_args: Mapping[str, object] | None
    """Further variables of the chat template."""
    continue_final_message: bool
    """Let the model go on with the last message, the assistant's, instead of beginning a new one."""
    model: str
    request_id: str
    """1 to 128 characters of [A-Za-z0-9_.:-], unique in the mesh; the client draws one otherwise."""
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    temperature: float | None
    """0 is greedy."""
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: int | None
    """How many of the likeliest tokens to report at each position, 0 to 20; None reports nothing."""
    num_choices: int | None
    request_class: Literal["interactive", "batch"]
    timeout: float | None
    """Seconds after which the request ends with `FinishReason.DEADLINE`."""
    return_token_ids: bool
    show_special_tokens: bool


class Client:
    """A connection to a gateway, opened and closed as an async context manager. One client carries any number of
    answers at once; it belongs to one event loop.

    `timeout`, in seconds, is for the calls that do not stream. Every method raises `holdfast.errors`: `Unavailable`
    where no gateway answers. Opening raises `ConfigurationError` where there can be no such address.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = 30.0) -> None:
        self.address = address
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        self._channel = rpc.channel(self.address)
        self._gateway: gateway_pb2_grpc.GatewayServiceAsyncStub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        cancel_on_exit: bool = True,
        **options: Unpack[Options],
    ) -> Answer:
        """The answer, as it grows, to exactly one of these: a prompt; the messages of a conversation; token ids, taken
        as they are. Nothing is sent before the answer is entered or its first event awaited.

        With `cancel_on_exit`, leaving the answer before its end, or losing the connection, cancels the request;
        without, it runs on and only the listening ends.

        Raises:
            InvalidRequest: an option that cannot be sent, or not exactly one input. What only the mesh can judge is
                raised by the answer.
        """
        request = _request(prompt, messages, token_ids, options)
        request.cancel_on_disconnect = cancel_on_exit
        return Answer(self._gateway, request, address=self.address)

    async def submit(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Submitted:
        """Has a request run in the background; returns when the log has it. Arguments and errors as `generate`."""
        request = gateway_pb2.SubmitRequest(request=_request(prompt, messages, token_ids, options))
        with _translated(self.address):
            response = await self._gateway.Submit(request, timeout=self._timeout)
        return Submitted(request_id=response.request_id, cursor=response.cursor)

    async def cancel(self, request_id: str) -> None:
        """Ends a request, wherever it runs. Returns when the log has the wish; cancelling what has ended changes
        nothing."""
        with _translated(self.address):
            await self._gateway.Cancel(gateway_pb2.CancelRequest(request_id=request_id), timeout=self._timeout)

    async def models(self) -> list[Model]:
        """The models that the mesh serves."""
        with _translated(self.address):
            response = await self._gateway.ListModels(gateway_pb2.ListModelsRequest(), timeout=self._timeout)
        return [model_from_wire(model) for model in response.models]

    async def health(self) -> bool:
        """Whether the gateway says that it can serve."""
        return await self._healthy(GATEWAY_SERVICE)

    async def needs(self) -> dict[str, bool]:
        """Whether the gateway says that each of `NEEDS` is there."""
        return {need: await self._healthy(need) for need in NEEDS}

    async def _healthy(self, name: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=name)
        with _translated(self.address):
            response = await health_pb2_grpc.HealthStub(self._channel).Check(request, timeout=self._timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class Answer(AsyncIterator[Event]):
    """The events of one request: `Accepted`, then `Tokens`, then `Finished` once for each choice.

    Leaving the block, `aclose`, cancelling the task that waits, and dropping the last reference (as `break` does to an
    answer that only its loop holds) all end the call at once; `Client.generate` says what that means for the request.

    Awaiting the next event raises any of `holdfast.errors`: a refusal, `StreamFailed` where the mesh could not finish
    or the events do not fit together, `Cancelled` where another task closed the answer meanwhile.
    """

    def __init__(
        self,
        gateway: gateway_pb2_grpc.GatewayServiceAsyncStub,
        request: gateway_pb2.GenerateRequest,
        *,
        address: str,
    ) -> None:
        self._gateway = gateway
        self._request = request
        self._address = address
        self._proof = _Proof(request.num_choices or 1, with_ids=request.return_token_ids)
        self._call: grpc.aio.UnaryStreamCall[gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse] | None = None
        self._closed = False

    @property
    def request_id(self) -> str:
        """The request's id, known from the start."""
        return self._request.request_id

    async def text(self) -> AsyncIterator[str]:
        """The text of choice 0, piece by piece. The answer is closed when it ends or is left."""
        async with self:
            async for event in self:
                if isinstance(event, Tokens) and event.choice == 0 and event.text:
                    yield event.text

    async def read(self) -> str:
        """The text of choice 0, awaited whole."""
        return "".join([piece async for piece in self.text()])

    async def aclose(self) -> None:
        """Ends the call, however far it is. May be called twice, early, and from another task."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> Event:
        if self._closed:
            raise StopAsyncIteration
        try:
            with _translated(self._address):
                response = await anext(self._begin())
            event = event_from_wire(response)
            self._proof.check(event)
            return event
        except StopAsyncIteration:
            self._closed = True
            self._proof.check_end()
            raise
        except BaseException:
            await self.aclose()
            raise

    def __del__(self) -> None:
        # grpcio 1.83 and later does not end a call that nobody refers to any more (grpc/grpc#43462).
        call = getattr(self, "_call", None)
        if call is not None and not call.done():
            call.cancel()

    def _begin(self) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        if self._call is None:
            timeout = self._request.timeout.ToNanoseconds() / 1e9
            self._call = self._gateway.Generate(self._request, timeout=timeout + _LATE if timeout else None)
        return aiter(self._call)


class _Proof:
    """What an answer has shown so far, so that nothing is missed and nothing comes twice."""

    def __init__(self, num_choices: int, *, with_ids: bool) -> None:
        self._with_ids = with_ids
        self._accepted = False
        self._num_tokens = [0] * num_choices
        self._open = set(range(num_choices))

    def check(self, event: Event) -> None:
        """Takes the next event.

        Raises:
            StreamFailed: it does not follow from those before it.
        """
        if isinstance(event, Accepted):
            _require(not self._accepted, "the request was accepted twice")
            self._accepted = True
            return
        _require(self._accepted, f"{type(event).__name__} came before the request was accepted")
        _require(event.choice in self._open, f"choice {event.choice} has ended, or was not asked for")
        if isinstance(event, Finished):
            self._open.remove(event.choice)
            return
        expected = self._num_tokens[event.choice]
        _require(
            event.first_index == expected,
            f"token {event.first_index} of choice {event.choice} came where token {expected} was due",
        )
        _require(not self._with_ids or len(event.token_ids) == event.num_tokens, "an event lacks its token ids")
        self._num_tokens[event.choice] += event.num_tokens

    def check_end(self) -> None:
        """Takes the end of the events.

        Raises:
            StreamFailed: a choice has not ended.
        """
        _require(not self._open, f"the stream ended before choices {sorted(self._open)} did")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StreamFailed(f"{otherwise}; the gateway broke its promise, the text so far is all that can be trusted")


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """Turns what a call raises into our errors."""
    try:
        yield
    except grpc.RpcError as error:
        ours = from_rpc_error(error)
        if type(ours) is Unavailable and rpc_status.from_call(error) is None:  # not said by a gateway, but about it
            raise Unavailable(f"no gateway answers at {address}; is one running there? ({ours})") from error
        raise ours from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # The task goes on: it was the call that somebody cancelled.
        raise Cancelled("the answer was closed while its next event was awaited") from None


_CLASSES = {
    "interactive": generation_pb2.REQUEST_CLASS_INTERACTIVE,
    "batch": generation_pb2.REQUEST_CLASS_BATCH,
}


def _request(
    prompt: str | None, messages: Sequence[Message] | None, token_ids: Sequence[int] | None, options: Options
) -> gateway_pb2.GenerateRequest:
    """The request as it goes over the wire.

    Raises:
        InvalidRequest: something that the wire cannot carry.
    """
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(f"unknown options: {', '.join(unknown)}")
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise InvalidRequest("give exactly one of a prompt, messages and token_ids", field="input")
    request_class = options.get("request_class", "interactive")
    if request_class not in _CLASSES:
        raise InvalidRequest(f"request_class is interactive or batch, not {request_class!r}", field="request_class")
    try:
        request = gateway_pb2.GenerateRequest(
            request_id=options.get("request_id") or uuid.uuid4().hex,
            model=options.get("model", ""),
            sampling=_sampling(options),
            stop=_stop(options),
            num_choices=options.get("num_choices"),
            request_class=_CLASSES[request_class],
            return_token_ids=options.get("return_token_ids", False),
            show_special_tokens=options.get("show_special_tokens", False),
        )
        if prompt is not None:
            request.prompt = prompt
        elif messages is not None:
            request.chat.CopyFrom(_chat(messages, options))
        else:
            request.token_ids.ids.extend(token_ids or ())
            request.token_ids.SetInParent()
        if (timeout := options.get("timeout")) is not None:
            request.timeout.FromNanoseconds(round(timeout * 1e9))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"an option has a value that cannot be sent: {error}") from error
    return request


def _sampling(options: Options) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        temperature=options.get("temperature"),
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
        min_p=options.get("min_p"),
        presence_penalty=options.get("presence_penalty"),
        frequency_penalty=options.get("frequency_penalty"),
        repetition_penalty=options.get("repetition_penalty"),
        logit_bias=options.get("logit_bias"),
        seed=options.get("seed"),
        logprobs=options.get("logprobs"),
    )


def _stop(options: Options) -> generation_pb2.StopRules:
    stop = options.get("stop", ())
    if isinstance(stop, str):
        raise InvalidRequest(f"stop is a list of strings, not {stop!r}", field="stop.stop")
    return generation_pb2.StopRules(
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens"),
        stop_token_ids=options.get("stop_token_ids", ()),
        stop=stop,
        ignore_eos=options.get("ignore_eos", False),
    )


def _chat(messages: Sequence[Message], options: Options) -> tokenizer_pb2.ChatInput:
    args = options.get("template_args")
    return tokenizer_pb2.ChatInput(
        messages=[_message(message) for message in messages],
        template_args_json=json.dumps(args) if args else "",
        continue_final_message=options.get("continue_final_message", False),
    )


def _message(message: Message) -> tokenizer_pb2.ChatMessage:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise InvalidRequest(f"a message has a role and a content, both text: {message!r} has not", field="messages")
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    return tokenizer_pb2.ChatMessage(role=role, content=content, fields_json=json.dumps(more) if more else "")
