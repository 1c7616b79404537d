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
import contextlib
import json
import uuid
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Literal, Self, TypedDict, Unpack

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdfast.errors import (
    Cancelled,
    HoldfastError,
    Interrupted,
    InvalidRequest,
    NotAccepted,
    RequestError,
    RetryableError,
    StreamFailed,
    Unavailable,
)
from holdfast.events import (
    Accepted,
    Event,
    Finished,
    Model,
    Result,
    Resumed,
    Submitted,
    Tokens,
    event_from_wire,
    model_from_wire,
    result_from_wire,
)
from holdfast.gateways import PATIENT, Gateway, Gateways, Patience, Tries, broke, is_lost, translated
from holdfast.v1 import gateway_pb2, generation_pb2, tokenizer_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Where a gateway listens unless it is told otherwise."""

GATEWAY_SERVICE = "holdfast.v1.GatewayService"

NEEDS = ("log", "tokenizer", "engine")
"""What a gateway needs to serve: the names under which its health tells whether each is there."""

_AT_ONCE = 0.001
"""Seconds to wait for a result whose time is over."""

_LATE = 5.0
"""Seconds that a call may outlive the deadline of its request: the gateway ends the answer, not the connection."""


_Call = (
    grpc.aio.UnaryStreamCall[gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse]
    | grpc.aio.UnaryStreamCall[gateway_pb2.ResumeRequest, gateway_pb2.ResumeResponse]
)

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
    """1 to 128 characters of [A-Za-z0-9_.:-], best one that nobody else uses; the client draws one otherwise."""
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

    `address` is that of a gateway, or those of several (a sequence, or with commas between): one is used, and the next
    where that does not answer. `patience` says how it goes on where its gateway is lost, or is being stopped or started:
    with streams as `generate` says, and with the other calls as far as they cannot be done twice thereby. One that never
    was there is not waited for.

    `timeout`, in seconds, is for the calls that do not stream, each time. Every method raises `holdfast.errors`:
    `Unavailable` where no gateway answers. Opening raises `ConfigurationError` where there can be no such address.
    """

    def __init__(
        self, address: str | Sequence[str] = DEFAULT_ADDRESS, *, timeout: float = 30.0, patience: Patience = PATIENT
    ) -> None:
        addresses = [each.strip() for each in address.split(",")] if isinstance(address, str) else list(address)
        self._gateways = Gateways(addresses)
        self._timeout = timeout
        self._patience = patience
        self._answers: weakref.WeakSet[Answer] = weakref.WeakSet()

    @property
    def address(self) -> str:
        """Where the gateway listens that is in use; all addresses before the client is open."""
        return self._gateways.address

    async def __aenter__(self) -> Self:
        self._opened = AsyncExitStack()
        await self._opened.enter_async_context(self._gateways.open())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for answer in list(self._answers):
                await answer.aclose()
        finally:
            await self._opened.aclose()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        cancel_on_exit: bool = True,
        resume: bool = True,
        **options: Unpack[Options],
    ) -> Answer:
        """The answer, as it grows, to exactly one of these: a prompt; the messages of a conversation; token ids, taken
        as they are. Nothing is sent before the answer is entered or its first event awaited.

        With `cancel_on_exit`, leaving the answer before its end cancels the request; without, it runs on and only the
        listening ends. Where the connection or the gateway is lost, the answer goes on at the next gateway, as if
        nothing had been, and the request runs on meanwhile. With `resume=False` the answer breaks instead, and with
        `cancel_on_exit` the connection is the request's lifetime: losing it cancels the request.

        Raises:
            InvalidRequest: an option that cannot be sent, or not exactly one input. What only the mesh can judge is
                raised by the answer.
        """
        request = _request(prompt, messages, token_ids, options)
        request.cancel_on_disconnect = cancel_on_exit and not resume
        request.hand_over = resume
        answer = Answer(
            self._gateways,
            request,
            patience=self._patience,
            resume=resume,
            cancel_on_exit=cancel_on_exit and resume,
            own_id=not options.get("request_id"),
        )
        self._answers.add(answer)
        return answer

    def resume(self, cursor: str) -> Answer:
        """The answer that a cursor is of, from there on: `Resumed`, then what comes after it. The answer goes on by itself
        as `generate` says; leaving it ends the request only where that was asked for with `resume=False`."""
        answer = Answer(self._gateways, None, cursor=cursor, patience=self._patience)
        self._answers.add(answer)
        return answer

    async def submit(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Submitted:
        """Has a request run in the background; returns when the log has it. Arguments and errors as `generate`."""
        request = _request(prompt, messages, token_ids, options)
        tries, own_id = Tries(self._gateways, self._patience), not options.get("request_id")
        while True:
            gateway = None
            try:
                gateway = await self._gateways.reachable()
                with translated(gateway.address):
                    response = await gateway.stub.Submit(
                        gateway_pb2.SubmitRequest(request=request), timeout=self._timeout
                    )
                return Submitted(request_id=response.request_id, cursor=response.cursor)
            except HoldfastError as error:
                if not may_be_asked_anew(error, own_id=own_id):
                    raise
                tries.count(error, gateway)
                if not isinstance(error, NotAccepted):
                    self._gateways.renew(request)  # at once: the caller may leave in the pause
                await tries.pause(error)

    async def result(self, cursor: str, *, wait: float | None = None) -> Result:
        """The whole answer to a request, from the cursor of its start (`Submitted.cursor`): awaited, or after `wait`
        seconds what there is of it."""
        request = gateway_pb2.GetResultRequest(cursor=cursor, hand_over=True)
        began = asyncio.get_running_loop().time()

        async def call(gateway: Gateway) -> gateway_pb2.GetResultResponse:
            if wait is None:
                return await gateway.stub.GetResult(request)
            left = wait - (asyncio.get_running_loop().time() - began)
            request.wait.FromNanoseconds(round((left if left > 0 else min(wait, _AT_ONCE)) * 1e9))
            return await gateway.stub.GetResult(request, timeout=max(left, 0) + self._timeout)

        return result_from_wire(await self._gateways.ask(call, self._patience))

    async def cancel(self, request_id: str = "", *, cursor: str = "") -> None:
        """Ends a request, wherever it runs: all of an id, or the one that a cursor is of. Returns when the log has the wish;
        cancelling what has ended changes nothing."""
        wish = gateway_pb2.CancelRequest(request_id=request_id, cursor=cursor)
        await self._gateways.cancel(wish, self._patience, timeout=self._timeout)

    async def models(self) -> list[Model]:
        """The models that the mesh serves."""

        async def call(gateway: Gateway) -> gateway_pb2.ListModelsResponse:
            return await gateway.stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=self._timeout)

        return [model_from_wire(model) for model in (await self._gateways.ask(call, self._patience)).models]

    async def health(self) -> bool:
        """Whether the gateway says that it can serve."""
        return await self._healthy(GATEWAY_SERVICE)

    async def needs(self) -> dict[str, bool]:
        """Whether the gateway says that each of `NEEDS` is there."""
        return {need: await self._healthy(need) for need in NEEDS}

    async def _healthy(self, name: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=name)
        gateway = await self._gateways.reachable()
        with translated(gateway.address):
            response = await health_pb2_grpc.HealthStub(gateway.channel).Check(request, timeout=self._timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class Answer(AsyncIterator[Event]):
    """The events of one request: `Accepted`, then `Tokens`, then `Finished` once for each choice.

    Leaving the block, `aclose`, cancelling the task that waits, and dropping the last reference (as `break` does to an
    answer that only its loop holds) all end the call at once; `Client.generate` says what that means for the request,
    and for an answer whose connection is lost.

    Awaiting the next event raises any of `holdfast.errors`: a refusal, `StreamFailed` where the mesh could not finish
    or the events do not fit together, `Interrupted` where no gateway could be found to go on, `Cancelled` where another
    task closed the answer meanwhile.
    """

    def __init__(
        self,
        gateways: Gateways,
        request: gateway_pb2.GenerateRequest | None,
        *,
        cursor: str = "",
        patience: Patience,
        resume: bool = True,
        cancel_on_exit: bool = False,
        own_id: bool = False,
    ) -> None:
        """`request`: None to go on from `cursor`. `resume`: not to break with the connection. `own_id`: the id was
        drawn here, and may be drawn anew where nobody knows whether the mesh has the request."""
        self._gateways = gateways
        self._request = request
        self._tries = Tries(gateways, patience)
        self._resume = resume
        self._cancel_on_exit = cancel_on_exit
        self._own_id = own_id
        self._proof = _Proof(request)
        self._request_id = request.request_id if request is not None else ""
        self._first_cursor = self._cursor = cursor
        self._call: _Call | None = None
        self._gateway: Gateway | None = None
        self._until: float | None = None
        """Loop time until which the whole answer may take."""
        self._resuming = False
        self._closed = False
        self._over = False
        """Whether there is nothing to cancel: it has not begun, has ended, or the mesh said why it will not go on."""

    @property
    def request_id(self) -> str:
        """The request's id. It is certain once the request was accepted: until then it is drawn anew where another
        gateway has to be asked, unless it was given. Empty where a cursor's stream has not gone on yet."""
        return self._request_id

    @property
    def cursor(self) -> str:
        """Where the stream stands after the last event; empty before the first one."""
        return self._cursor

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
        if (farewell := self._leave()) is not None:
            await asyncio.wait([farewell])

    async def __aenter__(self) -> Self:
        with contextlib.suppress(Unavailable):  # the first event says so, or finds a gateway
            await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> Event:
        if self._closed:
            raise StopAsyncIteration
        try:
            while (event := await self._next()) is None:
                pass
            return event
        except StopAsyncIteration:
            self._closed = self._over = True
            self._proof.check_end()
            raise
        except BaseException:
            await self.aclose()
            raise

    def __del__(self) -> None:
        # grpcio 1.83 and later does not end a call that nobody refers to any more (grpc/grpc#43462).
        if getattr(self, "_call", None) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._leave()

    async def _next(self) -> Event | None:
        """The next event; None where the stream was resumed, or will be."""
        try:
            call = await self._begin()
            assert self._gateway is not None
            with translated(self._gateway.address):
                event = event_from_wire(await anext(aiter(call)))
        except HoldfastError as error:
            await self._recover(error)
            return None
        self._proof.check(event)
        self._cursor = event.cursor
        if isinstance(event, Resumed):
            self._resuming, first = False, not self._request_id
            self._request_id = event.request_id
            return event if first else None
        self._tries.begin_anew()
        return event

    async def _begin(self) -> _Call:
        """The call that is open, or a new one."""
        if self._call is None:
            gateway = await self._gateways.reachable()
            if self._closed:
                raise Cancelled("the answer was closed before it began")
            self._gateway = gateway
            if self._cursor or self._request is None:
                self._resuming = True
                resume = gateway_pb2.ResumeRequest(cursor=self._cursor, hand_over=self._resume)
                self._call = gateway.stub.Resume(resume, timeout=self._time_left())
            else:
                self._call = gateway.stub.Generate(self._request, timeout=self._time_left())
        return self._call

    def _time_left(self) -> float | None:
        """Seconds that the call may take; None for ever."""
        if self._request is None or not self._request.HasField("timeout"):
            return None
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._request.timeout.ToNanoseconds() / 1e9 + _LATE
        return max(_LATE, self._until - now)

    async def _recover(self, error: HoldfastError) -> None:
        """Gets ready for another call after this error, and waits until it is time for it.

        Raises:
            HoldfastError: the error, or what became of it, where there is no use in that.
        """
        if self._closed:
            raise error
        try:
            await (self._go_on_after(error) if self._cursor else self._ask_anew_after(error))
        except HoldfastError:
            self._over = True
            raise

    async def _go_on_after(self, error: HoldfastError) -> None:
        """The mesh has the request: after whatever passes, the stream goes on from its cursor."""
        if not self._resume or not (isinstance(error, RetryableError) or broke(error)):
            if self._resuming and self._cursor != self._first_cursor and isinstance(error, RequestError):
                raise StreamFailed(
                    f"the stream broke and cannot be resumed: {error} (its last cursor: {self._cursor})"
                ) from error
            raise error
        try:
            await self._tries.after(error, self._drop_call(), going_on=True)
        except HoldfastError:
            raise Interrupted(
                f"the stream broke, and {self._tries.num_failed - 1} tries to go on with it failed, the last one so: {error} "
                f"(its last cursor: {self._cursor})",
                cursor=self._cursor,
            ) from error

    async def _ask_anew_after(self, error: HoldfastError) -> None:
        """Nobody said that the mesh has the request."""
        if not may_be_asked_anew(error, own_id=self._own_id):
            raise error
        self._tries.count(error, self._drop_call())
        if not isinstance(error, NotAccepted):
            assert self._request is not None
            self._gateways.renew(self._request)  # at once: the client may leave in the pause
            self._request_id = self._request.request_id
        await self._tries.pause(error)

    def _drop_call(self) -> Gateway | None:
        """Ends the call that failed; returns the gateway that it was to."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
        gateway, self._gateway = self._gateway, None
        return gateway

    def _leave(self) -> asyncio.Task[None] | None:
        """Ends the call; returns what has the request end where that is wanted."""
        self._closed = True
        begun = self._call is not None or self._cursor
        self._drop_call()
        if not begun or self._over or not self._cancel_on_exit:
            return None
        self._over = True
        # By the cursor, where there is one: somebody else may have used the id.
        by_id = self._own_id or not self._cursor
        return self._gateways.farewell(
            gateway_pb2.CancelRequest(request_id=self._request_id)
            if by_id
            else gateway_pb2.CancelRequest(cursor=self._cursor)
        )


def may_be_asked_anew(error: HoldfastError, *, own_id: bool) -> bool:
    """Whether a request may be sent again after this error, before anybody said that the mesh has it. It may have it all the
    same, unless the error says otherwise: then only a request of another id will do."""
    return isinstance(error, NotAccepted) or (own_id and is_lost(error))


class _Proof:
    """What an answer has shown so far, so that nothing is missed and nothing comes twice."""

    def __init__(self, request: gateway_pb2.GenerateRequest | None) -> None:
        """`request`: None where the stream goes on from a cursor, and its first event says where it stands."""
        self._with_ids = request is not None and request.return_token_ids
        num_choices = (request.num_choices or 1) if request is not None else 0
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
        if isinstance(event, Resumed):
            self._check_resumed(event)
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

    def _check_resumed(self, resumed: Resumed) -> None:
        if not self._accepted:  # its first event: nothing is known here of what came before
            self._accepted = True
            self._num_tokens = list(resumed.next_index)
            self._open = set(range(len(resumed.next_index))) - set(resumed.ended)
        expected = [index for index in range(len(self._num_tokens)) if index not in self._open]
        _require(
            (list(resumed.next_index), sorted(resumed.ended)) == (self._num_tokens, expected),
            f"the stream went on at tokens {list(resumed.next_index)} where {self._num_tokens} were due",
        )

    def check_end(self) -> None:
        """Takes the end of the events.

        Raises:
            StreamFailed: a choice has not ended.
        """
        _require(not self._open, f"the stream ended before choices {sorted(self._open)} did")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StreamFailed(f"{otherwise}; the gateway broke its promise, the text so far is all that can be trusted")


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
