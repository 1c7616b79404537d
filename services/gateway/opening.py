"""Answers, opened: at the start of a request that the log is about to get, or at a cursor of one that it has."""

from __future__ import annotations

from holdfast.records import accepted_at_of
from holdfast.v1 import generation_pb2 as pb
from services.gateway.answer import Answer
from services.gateway.cancel import Canceller
from services.gateway.choice import Manner
from services.gateway.cursor import Cursor, Cursors
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Streams
from services.gateway.tails import Tails


class Opening:
    """Connects answers to those who feed them, and who end their requests."""

    def __init__(self, settings: GatewaySettings, *, cursors: Cursors, tails: Tails, canceller: Canceller) -> None:
        self._settings = settings
        self._cursors = cursors
        self._tails = tails
        self._canceller = canceller

    def answer(
        self,
        start: Cursor,
        request: pb.GenerationRequest,
        tail: Streams,
        *,
        spelled: bool,
        only_ask: bool = False,
    ) -> Answer:
        """The answer to a request, as the log has it, from there on; to be fed by the tail of its reply partition. `spelled`: with
        the texts of tokens that log-probabilities are wanted of. With `only_ask` a client that leaves ends nothing."""
        shown = request.presentation
        return Answer(
            start,
            prompt_tokens=len(request.prompt_token_ids),
            manner=Manner(
                stop=tuple(request.stop.stop),
                show_special_tokens=shown.show_special_tokens,
                return_token_ids=shown.return_token_ids,
                spelled=spelled and request.sampling.HasField("logprobs"),
            ),
            cursors=self._cursors,
            cancel_on_disconnect=shown.cancel_on_disconnect and not only_ask,
            flush=self._settings.flush_ms / 1000,
            max_waiting=self._settings.max_buffered_tokens,
            on_end=tail.forget,
            on_overflow=lambda answer: self._tails.fell_behind(answer, tail),
            cancel=lambda choice, reason: self._canceller.wish(
                request.request_id, choice, reason, accepted_at=accepted_at_of(request)
            ),
        )
