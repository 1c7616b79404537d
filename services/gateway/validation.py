"""What a request may say: every field of `GenerateRequest` against the contract and the model. Pure.

Every refusal names the field as the contract does (`sampling.temperature`), says what was given and what would be right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from holdfast import ids
from holdfast.errors import InvalidRequest, NotFound
from holdfast.events import Model
from holdfast.v1 import gateway_pb2, generation_pb2, tokenizer_pb2

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_LENGTH = 256
"""Most characters of a stop string."""


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to `high`; `low` itself is one of them unless `above`."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        """Never true of NaN."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"above {self.low:g} and at most {self.high:g}" if self.above else f"from {self.low:g} to {self.high:g}"


SAMPLING_RANGES = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 10, above=True),
}
BIAS_RANGE = Range(-100, 100)


def check_request(request: gateway_pb2.GenerateRequest, model: Model, *, max_prompt_bytes: int) -> None:
    """Everything that can be said about a request before its prompt is tokenized.

    Raises:
        InvalidRequest: a field has a value that it may not have.
        NotFound: the mesh does not serve the model.
    """
    if request.request_id:
        ids.check(request.request_id)
    if request.model not in ("", model.name):
        raise NotFound(f"no model {request.model!r} here; this mesh serves {model.name!r}")
    _check_input(request, model, max_prompt_bytes)
    _check_sampling(request.sampling, model)
    _check_stop(request.stop, model)
    if request.HasField("num_choices") and not 1 <= request.num_choices <= MAX_CHOICES:
        raise _wrong("num_choices", request.num_choices, f"must be from 1 to {MAX_CHOICES}")
    if request.request_class not in generation_pb2.RequestClass.values():
        raise _wrong("request_class", request.request_class, "must be REQUEST_CLASS_INTERACTIVE (1) or _BATCH (2)")


def check_lengths(num_prompt: int, rules: generation_pb2.StopRules, model: Model, *, max_prompt: int | None) -> None:
    """Whether the tokenized prompt and the answer asked for fit into the model's context.

    Raises:
        InvalidRequest: they do not; says what would.
    """
    room = model.context_length - num_prompt
    if num_prompt == 0:
        raise InvalidRequest("the prompt has no tokens; it must have at least one", field="input")
    if max_prompt is not None and num_prompt > max_prompt:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens; this gateway takes at most {max_prompt}", field="input"
        )
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens; the context of {model.name} is {model.context_length} tokens of prompt "
            f"and answer together, so a prompt may have at most {model.context_length - 1}",
            field="input",
        )
    if rules.HasField("max_tokens") and rules.max_tokens > room:
        raise InvalidRequest(
            f"{num_prompt} tokens of prompt and {rules.max_tokens} of answer are more than the context of {model.name}, "
            f"{model.context_length} tokens; max_tokens may be at most {room} after this prompt",
            field="stop.max_tokens",
        )


def _check_input(request: gateway_pb2.GenerateRequest, model: Model, max_bytes: int) -> None:
    match request.WhichOneof("input"):
        case "prompt":
            if not request.prompt:
                raise InvalidRequest("the prompt is empty; it must have at least one character", field="prompt")
            _check_size("prompt", [request.prompt], max_bytes)
        case "chat":
            _check_chat(request.chat, model, max_bytes)
        case "token_ids":
            if not request.token_ids.ids:
                raise InvalidRequest("the prompt is empty; it must have at least one token id", field="token_ids.ids")
            _check_fits("token ids", len(request.token_ids.ids), model, field="token_ids.ids")
            _check_ids("token_ids.ids", request.token_ids.ids, model)
        case _:
            raise InvalidRequest("the request has no input; set one of prompt, chat and token_ids", field="input")


def _check_chat(chat: tokenizer_pb2.ChatInput, model: Model, max_bytes: int) -> None:
    if not model.chat:
        raise InvalidRequest(f"{model.name} has no chat template; give it a prompt or token_ids", field="chat")
    if not chat.messages:
        raise InvalidRequest("the conversation is empty; it must have at least one message", field="chat.messages")
    _check_fits("messages", len(chat.messages), model, field="chat.messages")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequest("a message needs a role, such as user", field=f"chat.messages[{index}].role")
        _check_object(f"chat.messages[{index}].fields_json", message.fields_json)
    _check_object("chat.template_args_json", chat.template_args_json)
    texts = [text for message in chat.messages for text in (message.role, message.content, message.fields_json)]
    _check_size("chat.messages", [*texts, chat.template_args_json], max_bytes)
    if chat.continue_final_message and chat.messages[-1].role != "assistant":
        raise InvalidRequest(
            f"only the assistant's message can be continued, and the last is of {chat.messages[-1].role}",
            field="chat.continue_final_message",
        )


def _check_fits(what: str, count: int, model: Model, *, field: str) -> None:
    """Raises where there are so many that nobody need look at them: each is a token at least."""
    if count > model.context_length:
        raise InvalidRequest(
            f"{count} {what} are more than the context of {model.name}, {model.context_length} tokens", field=field
        )


def _check_object(field: str, text: str) -> None:
    """Raises unless the text is empty or a JSON object."""
    try:
        good = not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise _wrong(field, _short(text), "must be a JSON object")


def _check_size(field: str, texts: Iterable[str], max_bytes: int) -> None:
    size = sum(len(text.encode()) for text in texts)
    if size > max_bytes:
        raise InvalidRequest(f"{size:,} bytes of text; this gateway takes at most {max_bytes:,}", field=field)


def _check_ids(field: str, ids: Iterable[int], model: Model) -> None:
    highest = max(ids, default=0)
    if highest >= model.vocab_size:
        raise _wrong(field, highest, f"must be below {model.vocab_size}, the vocabulary of {model.name}")


def _check_sampling(sampling: generation_pb2.SamplingParams, model: Model) -> None:
    for name, allowed in SAMPLING_RANGES.items():
        value = getattr(sampling, name)
        if sampling.HasField(name) and value not in allowed:  # type: ignore[arg-type]  # a field's name, as data
            raise _wrong(f"sampling.{name}", f"{value:g}", f"must be {allowed}")
    if sampling.HasField("logprobs") and sampling.logprobs > MAX_LOGPROBS:
        raise _wrong("sampling.logprobs", sampling.logprobs, f"must be from 0 to {MAX_LOGPROBS}")
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise _wrong("sampling.logit_bias", f"{len(sampling.logit_bias)} entries", f"may have at most {MAX_LOGIT_BIAS}")
    _check_ids("sampling.logit_bias", sampling.logit_bias, model)
    for token_id, bias in sampling.logit_bias.items():
        if bias not in BIAS_RANGE:
            raise _wrong("sampling.logit_bias", f"{bias:g} for token {token_id}", f"must be {BIAS_RANGE}")


def _check_stop(rules: generation_pb2.StopRules, model: Model) -> None:
    if rules.HasField("max_tokens") and rules.max_tokens < 1:
        raise _wrong("stop.max_tokens", rules.max_tokens, "must be at least 1, or absent for what the context leaves")
    if rules.HasField("max_tokens") and rules.min_tokens > rules.max_tokens:
        raise _wrong("stop.min_tokens", rules.min_tokens, f"must be at most max_tokens, {rules.max_tokens}")
    if len(rules.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _wrong(
            "stop.stop_token_ids", f"{len(rules.stop_token_ids)} ids", f"may have at most {MAX_STOP_TOKEN_IDS}"
        )
    _check_ids("stop.stop_token_ids", rules.stop_token_ids, model)
    if len(rules.stop) > MAX_STOP_STRINGS:
        raise _wrong("stop.stop", f"{len(rules.stop)} strings", f"may have at most {MAX_STOP_STRINGS}")
    for text in rules.stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise _wrong("stop.stop", f"a string of {len(text)} characters", f"takes strings of 1 to {MAX_STOP_LENGTH}")


def _wrong(field: str, given: object, right: str) -> InvalidRequest:
    return InvalidRequest(f"{field.rpartition('.')[2]} {right}, not {given}", field=field)


def _short(text: str) -> str:
    """The text as an error may repeat it."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
