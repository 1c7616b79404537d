"""What a gateway tells a client, as Python values: the events of an answer, submitted requests, models."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from holdfast.errors import StreamFailed
from holdfast.v1 import gateway_pb2, generation_pb2


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    """The model ended it, or a stop string was found."""
    LENGTH = "length"
    """`max_tokens`, or the model's context, was reached."""
    CANCELLED = "cancelled"
    """Somebody cancelled the request."""
    DEADLINE = "deadline"
    """The request's `timeout` passed."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first event: the log has the request."""

    request_id: str
    cursor: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """The first event of a stream that goes on from a cursor."""

    request_id: str
    cursor: str
    prompt_tokens: int
    next_index: tuple[int, ...]
    """For each choice the index of the token that comes next."""
    ended: tuple[int, ...]
    """The choices of which nothing will come."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, in the model's own distribution."""

    logprob: float
    """Of the chosen token."""
    top: tuple[TopLogprob, ...]
    """The likeliest ones, likeliest first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one choice."""

    choice: int
    first_index: int
    """Index of the first of them among all tokens of the choice."""
    num_tokens: int
    text: str
    """New text, whole characters; may be empty, and may hold what an earlier event's tokens began."""
    token_ids: tuple[int, ...]
    """The tokens, where `return_token_ids` asked for them."""
    logprobs: tuple[TokenLogprobs, ...]
    """One for each token, where `logprobs` asked for them."""
    cursor: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written for one choice."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    usage: Usage
    stop: str
    """The stop string that was found, if that ended it."""
    cursor: str


Event = Accepted | Resumed | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request that runs in the background."""

    request_id: str
    cursor: str


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One choice of an answer, as far as it is there."""

    text: str
    num_tokens: int
    token_ids: tuple[int, ...]
    """The tokens, where `return_token_ids` asked for them."""
    logprobs: tuple[TokenLogprobs, ...]
    """One for each token, where `logprobs` asked for them."""
    finished: Finished | None
    """Its end; None where it has not ended."""


@dataclass(frozen=True, slots=True)
class Result:
    """An answer, as far as it is there."""

    request_id: str
    prompt_tokens: int
    choices: tuple[ChoiceResult, ...]

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finished is not None for choice in self.choices)


def collected(request_id: str, *, prompt_tokens: int, num_choices: int, events: Iterable[Tokens | Finished]) -> Result:
    """What these events, all from the start on, say together."""
    tokens: list[list[Tokens]] = [[] for _ in range(num_choices)]
    ends: list[Finished | None] = [None] * num_choices
    for event in events:
        if isinstance(event, Finished):
            ends[event.choice] = event
        else:
            tokens[event.choice].append(event)
    choices = tuple(_choice_result(mine, end) for mine, end in zip(tokens, ends, strict=True))
    return Result(request_id, prompt_tokens=prompt_tokens, choices=choices)


def _choice_result(tokens: Sequence[Tokens], end: Finished | None) -> ChoiceResult:
    return ChoiceResult(
        text="".join(each.text for each in tokens),
        num_tokens=sum(each.num_tokens for each in tokens),
        token_ids=tuple(token_id for each in tokens for token_id in each.token_ids),
        logprobs=tuple(logprobs for each in tokens for logprobs in each.logprobs),
        finished=end,
    )


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the mesh serves."""

    name: str
    context_length: int
    """Most tokens of prompt and answer together."""
    vocab_size: int
    chat: bool
    """Whether it takes `messages`."""
    created: datetime
    """Since when this gateway serves it."""


_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    generation_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
}


def event_from_wire(response: gateway_pb2.GenerateResponse | gateway_pb2.ResumeResponse) -> Event:
    """The event that a message carries.

    Raises:
        StreamFailed: it carries none that this client knows.
    """
    if isinstance(response, gateway_pb2.GenerateResponse) and response.HasField("accepted"):
        accepted = response.accepted
        return Accepted(accepted.request_id, cursor=accepted.cursor, prompt_tokens=accepted.prompt_tokens)
    if isinstance(response, gateway_pb2.ResumeResponse) and response.HasField("resumed"):
        return _resumed(response.resumed)
    match response.WhichOneof("event"):
        case "tokens":
            return _tokens(response.tokens)
        case "finished" if response.finished.reason in _REASONS:
            return _finished(response.finished)
        case _:
            raise StreamFailed("the gateway sent an event that this client does not know; it is newer than the client")


def _resumed(resumed: gateway_pb2.Resumed) -> Resumed:
    return Resumed(
        resumed.request_id,
        cursor=resumed.cursor,
        prompt_tokens=resumed.prompt_tokens,
        next_index=tuple(resumed.next_index),
        ended=tuple(resumed.ended),
    )


def result_from_wire(response: gateway_pb2.GetResultResponse) -> Result:
    """The answer that a message carries, as far as it is there."""
    return Result(
        response.request_id,
        prompt_tokens=response.prompt_tokens,
        choices=tuple(_choice_result_from_wire(choice) for choice in response.choices),
    )


def _choice_result_from_wire(choice: gateway_pb2.ChoiceResult) -> ChoiceResult:
    return ChoiceResult(
        text=choice.text,
        num_tokens=choice.num_tokens,
        token_ids=tuple(choice.token_ids),
        logprobs=_logprobs(choice.logprobs),
        finished=_finished(choice.finished) if choice.HasField("finished") else None,
    )


def _logprobs(logprobs: Iterable[generation_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(each.logprob, top=tuple(TopLogprob(top.token_id, top.logprob) for top in each.top))
        for each in logprobs
    )


def _tokens(tokens: gateway_pb2.Tokens) -> Tokens:
    return Tokens(
        choice=tokens.choice,
        first_index=tokens.first_index,
        num_tokens=tokens.num_tokens,
        text=tokens.text,
        token_ids=tuple(tokens.token_ids),
        logprobs=_logprobs(tokens.logprobs),
        cursor=tokens.cursor,
    )


def _finished(finished: gateway_pb2.Finished) -> Finished:
    return Finished(
        choice=finished.choice,
        reason=_REASONS[finished.reason],
        usage=Usage(
            prompt_tokens=finished.usage.prompt_tokens,
            cached_tokens=finished.usage.cached_tokens,
            completion_tokens=finished.usage.completion_tokens,
        ),
        stop=finished.stop,
        cursor=finished.cursor,
    )


def model_from_wire(model: gateway_pb2.Model) -> Model:
    """The model that a message describes."""
    return Model(
        name=model.name,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        chat=model.chat,
        created=model.created.ToDatetime(tzinfo=UTC),
    )
