"""Events as the OpenAI API's replies: chunks of a stream, or one object. Pure."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import Cancelled, DeadlineExceeded, HoldfastError, InvalidRequest, NotFound, wire
from holdfast.events import Finished, FinishReason, Model, TokenLogprobs, Usage
from services.gateway.admission import TIMEOUT_PASSED
from services.gateway.choice import SpelledTokens, Spelling
from services.gateway.openai import param

LOWEST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have."""

FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""The reasons that the API knows; the others are errors to it."""


@dataclass(slots=True)
class Ledger:
    """What a call has cost: a prompt once, all its choices."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def prompt(self, tokens: int) -> None:
        """A request was accepted."""
        self.prompt_tokens += tokens

    def finished(self, usage: Usage, *, first: bool) -> None:
        """A choice ended; only the first of a request tells what of the prompt was found in a cache."""
        self.completion_tokens += usage.completion_tokens
        if first:
            self.cached_tokens += usage.cached_tokens

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Whole:
    """All of one choice, for a reply in one piece."""

    text: list[str] = field(default_factory=list)
    logprobs: list[tuple[Spelling, TokenLogprobs]] = field(default_factory=list)
    finish_reason: str = ""


class Reply(ABC):
    """The form of one API's replies."""

    object_whole: str
    object_chunk: str

    def __init__(
        self,
        *,
        reply_id: str,
        created: int,
        model: str,
        include_usage: bool,
        logprobs: bool,
        offsets: Sequence[int] = (),
    ) -> None:
        """`offsets`: for each choice the characters of its tokens that were told of before, where there were any."""
        self._id, self._created, self._model = reply_id, created, model
        self._logprobs = logprobs
        head = {"id": reply_id, "object": self.object_chunk, "created": created, "model": model}
        self._head = json.dumps(head)[:-1] + ', "choices": ['
        self._tail = '], "usage": null}' if include_usage else "]}"
        self._offsets = dict(enumerate(offsets))

    def chunk(self, index: int, tokens: SpelledTokens) -> str:
        """New tokens of a choice; "" where there is nothing to see."""
        spelled = spelled_logprobs(tokens)
        if not tokens.text and not spelled:
            return ""
        logprobs = json.dumps(self._logprobs_json(index, spelled)) if self._logprobs else "null"
        return (
            f'{self._head}{{"index": {index}, {self._delta(tokens.text)}, "logprobs": {logprobs}, '
            f'"finish_reason": null}}{self._tail}'
        )

    def last_chunk(self, index: int, finish_reason: str) -> str:
        """The end of a choice."""
        return (
            f'{self._head}{{"index": {index}, {self._delta("", last=True)}, "logprobs": null, '
            f'"finish_reason": "{finish_reason}"}}{self._tail}'
        )

    def first_chunk(self, index: int) -> str:
        """What opens a choice; "" where nothing does."""
        return ""

    def usage_chunk(self, ledger: Ledger) -> str:
        """The chunk without choices that ends a stream whose client wants to know."""
        return f'{self._head}], "usage": {json.dumps(ledger.json())}}}'

    def whole(self, choices: Sequence[Whole], ledger: Ledger) -> dict[str, Any]:
        """The reply in one piece."""
        return {
            "id": self._id,
            "object": self.object_whole,
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": ledger.json(),
        }

    def _choice(self, index: int, choice: Whole) -> dict[str, Any]:
        return {
            "index": index,
            **self._content("".join(choice.text)),
            "logprobs": self._logprobs_json(index, choice.logprobs) if self._logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    @abstractmethod
    def _delta(self, text: str, *, last: bool = False) -> str:
        """The member of a chunk's choice that holds its text."""

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """The member of a whole choice that holds its text."""

    @abstractmethod
    def _logprobs_json(self, index: int, spelled: Sequence[tuple[Spelling, TokenLogprobs]]) -> dict[str, Any]: ...


class ChatReply(Reply):
    """`/v1/chat/completions`."""

    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def first_chunk(self, index: int) -> str:
        delta = '"delta": {"role": "assistant", "content": ""}'
        return f'{self._head}{{"index": {index}, {delta}, "logprobs": null, "finish_reason": null}}{self._tail}'

    def _delta(self, text: str, *, last: bool = False) -> str:
        return '"delta": {}' if last else f'"delta": {{"content": {json.dumps(text)}}}'

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs_json(self, index: int, spelled: Sequence[tuple[Spelling, TokenLogprobs]]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **_token(spelling.token, logprobs.logprob),
                    "top_logprobs": [
                        _token(text, top.logprob) for text, top in zip(spelling.top, logprobs.top, strict=True)
                    ],
                }
                for spelling, logprobs in spelled
            ],
            "refusal": None,
        }


class CompletionReply(Reply):
    """`/v1/completions`."""

    object_whole = "text_completion"
    object_chunk = "text_completion"

    def _delta(self, text: str, *, last: bool = False) -> str:
        return f'"text": {json.dumps(text)}'

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs_json(self, index: int, spelled: Sequence[tuple[Spelling, TokenLogprobs]]) -> dict[str, Any]:
        return {
            "tokens": [spelling.token for spelling, _ in spelled],
            "token_logprobs": [_finite(logprobs.logprob) for _, logprobs in spelled],
            "top_logprobs": [
                {text: _finite(top.logprob) for text, top in zip(spelling.top, logprobs.top, strict=True)}
                for spelling, logprobs in spelled
            ],
            "text_offset": [self._offset(index, spelling.token) for spelling, _ in spelled],
        }

    def _offset(self, index: int, token: str) -> int:
        """Where in the choice's text a token begins, in characters."""
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(token)
        return offset


def _token(text: str, logprob: float) -> dict[str, Any]:
    """A token of a chat's log-probabilities. The bytes of one that is a part of a character are not known here: alone
    its text is empty, or has a replacement character."""
    known = text and "\ufffd" not in text
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if known else None}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def spelled_logprobs(tokens: SpelledTokens) -> list[tuple[Spelling, TokenLogprobs]]:
    """The log-probabilities of those tokens that have text; a stop token has none."""
    return list(zip(tokens.spellings, tokens.logprobs, strict=False))


def finish_reason(finished: Finished) -> str:
    """The API's word for the end of a choice.

    Raises:
        DeadlineExceeded, Cancelled: it has none for these; the call ends with an error.
    """
    match finished.reason:
        case FinishReason.DEADLINE:
            raise DeadlineExceeded(TIMEOUT_PASSED)
        case FinishReason.CANCELLED:
            raise Cancelled("somebody cancelled the request")
        case reason:
            return FINISH_REASONS[reason]


def error_json(error: HoldfastError, *, chat: bool = False) -> dict[str, Any]:
    """The body of a refusal."""
    field = error.field if isinstance(error, InvalidRequest) else "model" if isinstance(error, NotFound) else ""
    return {
        "error": {
            "message": str(error),
            "type": wire(error).openai_type,
            "param": param(field, chat=chat) or None,
            "code": re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower(),
        }
    }


def models_json(models: Iterable[Model]) -> dict[str, Any]:
    """The list of `/v1/models`."""
    return {"object": "list", "data": [model_json(model) for model in models]}


def model_json(model: Model) -> dict[str, Any]:
    """One model, as in `/v1/models`."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created.timestamp()),
        "owned_by": "holdfast",
        "max_model_len": model.context_length,
    }
