"""The tokenizer as the gateway uses it: what model it has, and prompts to ids."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from holdfast.errors import (
    ConfigurationError,
    DeadlineExceeded,
    HoldfastError,
    InvalidRequest,
    NotAccepted,
    Unavailable,
    from_rpc_error,
)
from holdfast.events import Model
from holdfast.v1 import gateway_pb2, generation_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from services.gateway.admission import TIMEOUT_PASSED

log = structlog.get_logger(__name__)

BACKOFF_SECONDS = 0.1
"""Between two questions to a tokenizer that is there but refuses to answer. Until one is there, gRPC backs off."""


RETURN_SECONDS = 5.0
"""How long a prompt waits where no tokenizer answers: one that is started again is back by then."""


class Tokenizer:
    """A client of the tokenizer service over one channel."""

    def __init__(self, channel: grpc.aio.Channel, *, seconds: float) -> None:
        """`seconds`: how long it may take for a prompt."""
        self._stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self._seconds = seconds
        self._info: tokenizer_pb2.GetTokenizerInfoResponse | None = None
        self._since = datetime.now(UTC)

    @property
    def model(self) -> Model:
        """The model whose tokenizer it is: the one this gateway serves.

        Raises:
            NotAccepted: no tokenizer has answered yet.
        """
        if self._info is None:
            raise NotAccepted("no tokenizer has answered yet, so this gateway does not know its model")
        return Model(
            name=self._info.model,
            context_length=self._info.context_length,
            vocab_size=self._info.vocab_size,
            chat=self._info.chat,
            created=self._since,
        )

    def with_defaults(self, request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateRequest:
        """The request, sampled as the model's makers say where it says nothing itself."""
        if self._info is None:
            return request
        sampling = generation_pb2.SamplingParams()
        sampling.CopyFrom(self._info.default_sampling)
        sampling.MergeFrom(request.sampling)
        if sampling.top_k == 0:  # all; in the log that is no value but an absence
            sampling.ClearField("top_k")
        filled = gateway_pb2.GenerateRequest()
        filled.CopyFrom(request)
        filled.sampling.CopyFrom(sampling)
        return filled

    async def wait_until_it_answers(self) -> None:
        """Returns once a tokenizer has said what it is.

        Raises:
            ConfigurationError: it is another one than before: ids and texts of open streams would not fit together.
        """
        info = None
        while info is None:
            try:
                info = await self._stub.GetTokenizerInfo(
                    tokenizer_pb2.GetTokenizerInfoRequest(), wait_for_ready=True, timeout=self._seconds
                )
            except grpc.RpcError as error:
                log.warning("waiting for the tokenizer", reason=str(from_rpc_error(error)))
                await asyncio.sleep(BACKOFF_SECONDS)
        if self._info is not None and (info.digest, info.model) != (self._info.digest, self._info.model):
            raise ConfigurationError(
                f"the tokenizer changed from {self._info.model} ({self._info.digest[:12]}) to {info.model} "
                f"({info.digest[:12]}); start the gateway again to serve that"
            )
        self._info = info

    async def encode(self, request: gateway_pb2.GenerateRequest, *, time_left: float | None) -> list[int]:
        """The ids of a request's input.

        Raises:
            InvalidRequest: the tokenizer refuses it, or the model's chat template does.
            DeadlineExceeded: the request's time was over before.
            NotAccepted: no tokenizer answers.
            Unavailable: the tokenizer takes too long.
        """
        if request.HasField("token_ids"):
            return list(request.token_ids.ids)
        timeout = self._seconds if time_left is None else min(self._seconds, time_left)
        try:
            return await self._encode(request, timeout)
        except grpc.RpcError as error:
            ours = what_it_says(error)
            if isinstance(ours, DeadlineExceeded) and timeout == self._seconds:
                raise Unavailable(f"the tokenizer did not answer within {self._seconds:g} seconds") from error
            if isinstance(ours, DeadlineExceeded):
                raise DeadlineExceeded(TIMEOUT_PASSED) from error
            if isinstance(ours, InvalidRequest):
                raise InvalidRequest(str(ours), field=_field(request, ours.field)) from error
            if isinstance(ours, Unavailable):
                raise NotAccepted(str(ours)) from error
            raise ours from error

    async def _encode(self, request: gateway_pb2.GenerateRequest, timeout: float) -> list[int]:
        """Raises grpc.RpcError, for want of a tokenizer only when there was none for a while."""
        now = asyncio.get_running_loop().time
        begin = now()
        while True:
            left = max(0.0, begin + timeout - now())
            try:
                if request.HasField("chat"):
                    chat = tokenizer_pb2.EncodeChatRequest(chat=request.chat)
                    return list((await self._stub.EncodeChat(chat, timeout=left)).ids.ids)
                texts = tokenizer_pb2.EncodeRequest(texts=[request.prompt])
                return list((await self._stub.Encode(texts, timeout=left)).ids[0].ids)
            except grpc.RpcError as error:
                if not isinstance(what_it_says(error), Unavailable) or now() - begin >= RETURN_SECONDS:
                    raise
            await asyncio.sleep(BACKOFF_SECONDS)

    def decode(self) -> grpc.aio.StreamStreamCall[tokenizer_pb2.DecodeRequest, tokenizer_pb2.DecodeResponse]:
        """A new call that decodes; the caller ends it."""
        return self._stub.Decode()


def what_it_says(error: grpc.RpcError) -> HoldfastError:
    """Why the tokenizer ended a call. Where it said nothing, gRPC speaks, and of addresses and sockets: that is for nobody
    outside."""
    silent = rpc_status.from_call(error) is None
    if silent and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN):
        return Unavailable("the tokenizer does not answer")
    return from_rpc_error(error)


def _field(request: gateway_pb2.GenerateRequest, field: str) -> str:
    """The tokenizer's field as a field of the gateway's request."""
    if request.HasField("prompt"):
        return "prompt"
    return field if field.startswith("chat") else "chat"
