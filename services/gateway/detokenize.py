"""Ids to text, for all streams of this gateway: one long-lived call to the tokenizer, one message for each step.

While a message is under way the ids that come meanwhile gather for the next one, so a slow tokenizer gets fewer and
larger messages, never a queue of them. Nothing is lost with the call: what a message asked is asked again, in full, by
the next call, which goes to any replica of the tokenizer. Until there is one the streams wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc
import grpc.aio
import structlog

from holdfast.errors import HoldfastError, InternalError, RequestError, StreamFailed, Unavailable
from holdfast.rpc import streaming
from holdfast.v1 import tokenizer_pb2
from services.gateway.answer import Answer, State
from services.gateway.choice import Choice, Piece
from services.gateway.readiness import Readiness
from services.gateway.tokenizer import Tokenizer, what_it_says

log = structlog.get_logger(__name__)

MAX_MESSAGE_IDS = 1 << 16
"""A message takes no further choice beyond this many ids; the rest goes with the next one."""

BACKOFF_SECONDS = 0.1
"""Between two calls to a tokenizer that answers, but ends the call. Between two attempts to reach one, gRPC backs off."""

MAX_FAILURES = 3
"""So many calls may end with INTERNAL, one after the other without an answer, before it is put down to what they asked."""

Call = grpc.aio.StreamStreamCall[tokenizer_pb2.DecodeRequest, tokenizer_pb2.DecodeResponse]


@dataclass(frozen=True, slots=True)
class Work:
    """What one choice needs decoded."""

    answer: Answer
    choice: Choice
    pieces: list[Piece]


class Detokenizer:
    """Decodes what it is given by `put`, as long as `run` runs."""

    def __init__(self, tokenizer: Tokenizer, readiness: Readiness) -> None:
        self._tokenizer = tokenizer
        self._readiness = readiness
        self._waiting: dict[Choice, Answer] = {}
        """Bounded by the open choices: each waits once, its ids gather in itself."""
        self._wake = asyncio.Event()
        self._num_failures = 0

    def put(self, choice: Choice, answer: Answer) -> None:
        """The choice may have something to decode. Its answer is told the text."""
        self._waiting[choice] = answer
        self._wake.set()

    async def run(self) -> None:
        """Keeps a call open to the tokenizer, and says whether there is one.

        Raises:
            ConfigurationError: the tokenizer that came back is another one.
        """
        while True:
            await self._tokenizer.wait_until_it_answers()
            await self._readiness.found("tokenizer")
            error = await self._decode()
            log.warning("the tokenizer ended the decoding; streams wait for it", reason=str(error))
            await self._readiness.lost("tokenizer", str(error))
            await asyncio.sleep(BACKOFF_SECONDS)

    async def _decode(self) -> HoldfastError:
        """Decodes over one call until it ends, and returns why it did."""
        works: list[Work] = []
        try:
            async with streaming(self._tokenizer.decode()) as call:
                call.add_done_callback(lambda _: self._wake.set())
                while True:
                    works = await self._next_works(call)
                    self._tell(works, await self._ask(call, works))
                    self._num_failures = 0
        except grpc.RpcError as error:
            reason = what_it_says(error)
        except HoldfastError as error:
            reason = error
        self._num_failures += 1
        self._give_back(works, reason)
        return reason

    def _give_back(self, works: Sequence[Work], reason: HoldfastError) -> None:
        """What a call left unanswered is for the next one, unless the call ended because of it: asked again it would end
        every call, those of the other streams too."""
        refused = isinstance(reason, RequestError) or (
            isinstance(reason, InternalError) and self._num_failures >= MAX_FAILURES
        )
        for work in works:
            if refused:
                work.answer.fail(StreamFailed(f"the tokenizer cannot decode the answer: {reason}"))
            else:
                self.put(work.choice, work.answer)

    async def _next_works(self, call: Call) -> list[Work]:
        """What there is to decode, as soon as there is something. Raises as `_read` where the call has ended."""
        works: list[Work] = []
        while not works:
            await self._wake.wait()
            self._wake.clear()
            if call.done():
                await self._read(call)
            works = self._take()
        return works

    def _take(self) -> list[Work]:
        works, num_ids = [], 0
        while self._waiting and num_ids < MAX_MESSAGE_IDS:
            choice = next(iter(self._waiting))
            answer = self._waiting.pop(choice)
            if answer.state is State.OPEN and (pieces := choice.to_decode()):
                works.append(Work(answer, choice, pieces))
                num_ids += sum(len(piece.ids) for piece in pieces)
        if self._waiting:
            self._wake.set()
        return works

    async def _ask(self, call: Call, works: Sequence[Work]) -> list[tokenizer_pb2.DecodedItem]:
        items = [_item(piece) for work in works for piece in work.pieces]
        with suppress(asyncio.InvalidStateError):  # the call has ended; reading says why
            await call.write(tokenizer_pb2.DecodeRequest(items=items))
        response = await self._read(call)
        assert len(response.items) == len(items), "one answer for each item"
        return list(response.items)

    async def _read(self, call: Call) -> tokenizer_pb2.DecodeResponse:
        """The next message.

        Raises:
            grpc.RpcError: the call failed.
            Unavailable: the tokenizer ended it.
        """
        response = await call.read()
        if isinstance(response, tokenizer_pb2.DecodeResponse):
            return response
        raise Unavailable("the tokenizer ended the call")

    def _tell(self, works: Sequence[Work], decoded: list[tokenizer_pb2.DecodedItem]) -> None:
        texts = iter(decoded)
        for work in works:
            mine = [next(texts) for _ in work.pieces]
            work.answer.decoded(work.choice, work.pieces, [item.text for item in mine], mine[0].num_consumed)
            self.put(work.choice, work.answer)  # it may have got more ids, or not have given all


def _item(piece: Piece) -> tokenizer_pb2.DecodeItem:
    return tokenizer_pb2.DecodeItem(
        context=piece.context,
        ids=piece.ids,
        last=piece.last,
        show_special_tokens=piece.show_special_tokens,
    )
