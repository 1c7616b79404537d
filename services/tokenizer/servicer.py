"""The service's edge: messages to calls, errors to fields."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from holdfast import rpc
from holdfast.errors import InvalidRequest, Overloaded
from holdfast.v1 import generation_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from services.tokenizer.chat import TemplateError
from services.tokenizer.decode import Detokenizer
from services.tokenizer.encode import Encoder
from services.tokenizer.loading import ModelTokenizer
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.renderer import Renderer
from services.tokenizer.settings import TokenizerSettings

SERVICE = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name

_INLINE_IDS = 1024
"""Most ids that one message of a Decode stream may carry to be decoded on the event loop: some milliseconds of work at
most. The ids of a step are fewer."""


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """TokenizerService, as protos/holdfast/v1/tokenizer.proto promises it."""

    def __init__(
        self,
        settings: TokenizerSettings,
        tokenizer: ModelTokenizer,
        *,
        model: str,
        encoder: Encoder,
        renderer: Renderer | None,
        detokenizer: Detokenizer,
        metrics: TokenizerMetrics,
    ) -> None:
        self._settings = settings
        self._encoder = encoder
        self._renderer = renderer
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._num_waiting = 0
        self._info = tokenizer_pb2.GetTokenizerInfoResponse(
            model=model,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tokenizer.eos_token_ids,
            chat=renderer is not None,
            digest=tokenizer.digest,
            default_sampling=generation_pb2.SamplingParams(**tokenizer.sampling),
        )

    @rpc.unary
    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> tokenizer_pb2.EncodeResponse:
        if len(request.texts) > self._settings.max_texts:
            limit = self._settings.max_texts
            raise InvalidRequest(f"{len(request.texts)} texts; a call has at most {limit}", field="texts")
        self._check_size(request.ByteSize(), field="texts")
        with self._encoding():
            ids_of_texts = await self._encoder.encode(request.texts, special_tokens=not request.no_special_tokens)
        self._metrics.encoded.inc(sum(map(len, ids_of_texts)))
        return tokenizer_pb2.EncodeResponse(ids=[tokenizer_pb2.TokenIds(ids=ids) for ids in ids_of_texts])

    @rpc.unary
    async def EncodeChat(
        self, request: tokenizer_pb2.EncodeChatRequest, context: Any
    ) -> tokenizer_pb2.EncodeChatResponse:
        if self._renderer is None:
            raise InvalidRequest(f"the model {self._info.model} has no chat template; send a prompt", field="chat")
        self._check_size(request.ByteSize(), field="chat")
        messages, variables = _messages(request.chat), _variables(request.chat)
        with self._encoding():
            try:
                pieces = await self._renderer.render(
                    messages, variables, continue_final=request.chat.continue_final_message
                )
                self._check_size(sum(len(piece.encode()) for piece in pieces), field="chat")
            except TemplateError as error:
                raise InvalidRequest(str(error), field="chat.messages") from error
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"the conversation is not valid Unicode: {error}", field="chat") from error
            ids_of_pieces = await self._encoder.encode(pieces, special_tokens=False)  # the template wrote them
        ids = list(chain.from_iterable(ids_of_pieces))
        self._metrics.encoded.inc(len(ids))
        return tokenizer_pb2.EncodeChatResponse(ids=tokenizer_pb2.TokenIds(ids=ids))

    @rpc.stream
    async def Decode(
        self, requests: AsyncIterator[tokenizer_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[tokenizer_pb2.DecodeResponse]:
        async for request in requests:
            num_ids = sum(len(item.ids) for item in request.items)
            if num_ids <= _INLINE_IDS:
                yield self._decoded(request)
            else:
                yield await asyncio.to_thread(self._decoded, request)
            self._metrics.decoded.inc(num_ids)

    @rpc.unary
    async def GetTokenizerInfo(
        self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: Any
    ) -> tokenizer_pb2.GetTokenizerInfoResponse:
        return self._info

    def _decoded(self, request: tokenizer_pb2.DecodeRequest) -> tokenizer_pb2.DecodeResponse:
        response = tokenizer_pb2.DecodeResponse()
        for index, item in enumerate(request.items):
            try:
                decoded = self._detokenizer.decode(
                    item.ids, context=item.context, last=item.last, show_special_tokens=item.show_special_tokens
                )
            except InvalidRequest as error:
                raise InvalidRequest(str(error), field=f"items[{index}].{error.field}") from error
            response.items.add(text=decoded.text, num_consumed=decoded.num_consumed)
        return response

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """One of the calls that may encode or wait at once.

        Raises:
            Overloaded: there are as many as settings allow.
        """
        if self._num_waiting >= self._settings.max_waiting:
            raise Overloaded(f"{self._num_waiting} calls wait for the tokenizer already; try again")
        self._num_waiting += 1
        try:
            with self._metrics.waiting.track_inprogress(), self._metrics.encode_seconds.time():
                yield
        finally:
            self._num_waiting -= 1

    def _check_size(self, size: int, *, field: str) -> None:
        limit = self._settings.max_text_bytes
        if size > limit:
            raise InvalidRequest(f"{size} bytes of text; a call has at most {limit}", field=field)


def _messages(chat: tokenizer_pb2.ChatInput) -> list[dict[str, Any]]:
    """The conversation as templates read it."""
    if not chat.messages:
        raise InvalidRequest("a conversation has at least one message", field="chat.messages")
    if chat.continue_final_message and chat.messages[-1].role != "assistant":
        raise InvalidRequest(
            f"only an assistant's message can be continued, and the last is by {chat.messages[-1].role!r}",
            field="chat.continue_final_message",
        )
    return [_message(message, f"chat.messages[{index}]") for index, message in enumerate(chat.messages)]


def _message(message: tokenizer_pb2.ChatMessage, path: str) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequest("a message needs a role, such as 'user'", field=f"{path}.role")
    fields = _object(message.fields_json, f"{path}.fields_json")
    if "role" in fields or ("content" in fields and message.content):
        raise InvalidRequest("role and content are given twice", field=f"{path}.fields_json")
    return {"role": message.role, "content": message.content, **fields}


def _variables(chat: tokenizer_pb2.ChatInput) -> dict[str, Any]:
    variables = _object(chat.template_args_json, "chat.template_args_json")
    if "messages" in variables:
        raise InvalidRequest("the conversation is given by chat.messages", field="chat.template_args_json")
    return variables


def _object(text: str, field: str) -> dict[str, Any]:
    """The JSON object in a field; an empty one for an empty field."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}", field=field) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"must be a JSON object, not {type(value).__name__}", field=field)
    return value


def servicer(implementation: TokenizerServicer) -> rpc.Servicer:
    """The service, as a server takes it."""
    add = tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server
    return rpc.Servicer(name=SERVICE, add=lambda server: add(implementation, server))
