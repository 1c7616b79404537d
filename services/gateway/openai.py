"""The OpenAI API's requests as ours: `/v1/chat/completions` and `/v1/completions`. Pure.

What a parameter means here, and which are known:

* as OpenAI documents them: model, messages or prompt (text, texts, ids, lists of ids), stream, stream_options
  (include_usage), max_tokens, max_completion_tokens, temperature, top_p, n, stop, seed, presence_penalty,
  frequency_penalty, logit_bias, logprobs, top_logprobs; without max_tokens a chat may fill the context and a
  completion has 16 tokens, or what the context leaves;
* more, named as other servers name them: top_k (-1 or 0: all), min_p, repetition_penalty, min_tokens, stop_token_ids,
  ignore_eos, skip_special_tokens, chat_template_kwargs, continue_final_message with add_generation_prompt; and timeout
  (seconds) and cancel_on_disconnect (true by default) as in our contract;
* without any effect: what cannot change the answer: who asks, what may be kept, what it may cost, what to guess first
  (`IGNORED`);
* what would change the answer, and is not supported: only the value that changes nothing (`NEUTRAL`), such as
  `"tools": []`, `"echo": false`, `"verbosity": "medium"`; reasoning_effort has none, as each model has its own default;
* everything else is refused, by name. null is as if the parameter was not there.

Lists are measured before they are walked: a body has room for a million entries, and streams wait while it is read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace

from holdfast.errors import InvalidRequest
from holdfast.v1 import gateway_pb2, generation_pb2, tokenizer_pb2
from services.gateway.validation import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

MAX_PROMPTS = 128
DEFAULT_COMPLETION_TOKENS = 16

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "prediction",
    }
)
"""Whatever they say, the answer is the same."""

Value = object
"""What JSON holds: dict, list, str, int, float, bool; never None, which is as if it was not there."""

NEUTRAL: Mapping[str, Callable[[Value, Mapping[str, Value]], bool]] = {
    "tools": lambda value, body: value == [],
    "tool_choice": lambda value, body: value in ("none", "auto"),
    "functions": lambda value, body: value == [],
    "function_call": lambda value, body: value in ("none", "auto"),
    "parallel_tool_calls": lambda value, body: isinstance(value, bool),
    "response_format": lambda value, body: value == {"type": "text"},
    "modalities": lambda value, body: value == ["text"],
    "verbosity": lambda value, body: value == "medium",
    "reasoning_effort": lambda value, body: False,
    "web_search_options": lambda value, body: False,
    "moderation": lambda value, body: False,
    "audio": lambda value, body: False,
    "echo": lambda value, body: value is False,
    "suffix": lambda value, body: value == "",
    "best_of": lambda value, body: value == body.get("n", 1),
}
"""Given the value and the whole body: whether it changes nothing."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Whose a message can be. What becomes of each is the chat template's to say."""

NEEDED = {"tool": "tool_call_id", "function": "name"}
"""What a message of a role must say besides its content: what it answers."""

SAMPLING = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")

COMMON = frozenset(
    {
        *SAMPLING,
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "top_k",
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "timeout",
        "cancel_on_disconnect",
    }
)
CHAT = COMMON | {
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
}
COMPLETION = COMMON | {"prompt"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks for."""

    requests: list[gateway_pb2.GenerateRequest]
    """One for each prompt, without ids."""
    chat: bool
    stream: bool
    include_usage: bool
    """Whether a stream tells its usage at the end."""
    default_max_tokens: int | None = None
    """Most tokens of each choice where the requests do not say; None for what the context leaves."""

    @property
    def has_cursors(self) -> bool:
        """Whether the events of the response have cursors, and its client can go on with it elsewhere."""
        return self.stream and len(self.requests) == 1

    @property
    def num_choices(self) -> int:
        """Of each request."""
        return self.requests[0].num_choices


def read_json(body: bytes) -> dict[str, Value]:
    """The JSON object that a body must be.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        values = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply: lists and objects in one another") from error
    except ValueError as error:  # of an integer, the one thing that JSON allows and Python does not
        digits = sys.get_int_max_str_digits()
        raise InvalidRequest(f"the body has a number with too many digits: more than {digits}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_kind(values)}")
    return values


def read_chat(values: Mapping[str, Value], context_length: int) -> Asked:
    """The request of `/v1/chat/completions`. `context_length`: the model's.

    Raises:
        InvalidRequest: a parameter is not supported, or has a value that it may not have; `field` names it.
    """
    fields = Fields(values, CHAT)
    request = _request(fields)
    request.chat.CopyFrom(_conversation(fields, context_length))
    most = [count for name in ("max_tokens", "max_completion_tokens") if (count := fields.integer(name, 1)) is not None]
    if most:
        request.stop.max_tokens = min(most)
    top = fields.integer("top_logprobs", 0)
    if fields.flag("logprobs"):
        request.sampling.logprobs = top or 0
    elif top is not None:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    return _asked(fields, [request], chat=True)


def read_completion(values: Mapping[str, Value], context_length: int) -> Asked:
    """The request, or several, of `/v1/completions`.

    Raises:
        InvalidRequest: as `read_chat`.
    """
    fields = Fields(values, COMPLETION)
    request = _request(fields)
    if (max_tokens := fields.integer("max_tokens", 1)) is not None:
        request.stop.max_tokens = max_tokens
    if (top := fields.integer("logprobs", 0)) is not None:
        request.sampling.logprobs = top
    requests = []
    for prompt in _prompts(fields, context_length):
        each = gateway_pb2.GenerateRequest()
        each.CopyFrom(request)
        if isinstance(prompt, str):
            each.prompt = _utf8("prompt", prompt)
        else:
            each.token_ids.ids.extend(prompt)
        requests.append(each)
    default = max(DEFAULT_COMPLETION_TOKENS, request.stop.min_tokens)
    return replace(_asked(fields, requests, chat=False), default_max_tokens=default)


def param(field: str, *, chat: bool) -> str:
    """What the OpenAI API calls a field of our contract."""
    if field in ("prompt", "token_ids.ids", "input", "chat"):
        return "messages" if chat else "prompt"
    names = {"num_choices": "n", "chat.template_args_json": "chat_template_kwargs"}
    if field == "sampling.logprobs" and chat:
        return "top_logprobs"
    return names.get(field) or field.removeprefix("sampling.").removeprefix("stop.").removeprefix("chat.")


class Fields:
    """The parameters of a body: each of a known name, taken by type."""

    def __init__(self, values: Mapping[str, Value], known: frozenset[str]) -> None:
        """Raises InvalidRequest where one is not supported."""
        self._values = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
        for name, value in self._values.items():
            if name in known:
                continue
            if name not in NEUTRAL:
                raise InvalidRequest(f"the parameter {name} is not known here; leave it out", field=name)
            if not NEUTRAL[name](value, self._values):
                raise InvalidRequest(f"the parameter {name} is not supported; leave it out", field=name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Value | None:
        """The value as it is, None where there is none."""
        return self._values.get(name)

    def number(self, name: str) -> float | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, "must be a number", value)
        try:
            return float(value)
        except OverflowError as error:
            raise _wrong(name, "is too large", value) from error

    def integer(self, name: str, low: int, high: int = (1 << 32) - 1) -> int | None:
        value = self._values.get(name)
        return None if value is None else _integer(name, value, low, high)

    def flag(self, name: str) -> bool:
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise _wrong(name, "must be true or false", value)
        return value

    def text(self, name: str) -> str:
        value = self._values.get(name, "")
        if not isinstance(value, str):
            raise _wrong(name, "must be a string", value)
        return _utf8(name, value)

    def items(self, name: str) -> list[Value]:
        value = self._values.get(name, [])
        if not isinstance(value, list):
            raise _wrong(name, "must be a list", value)
        return value

    def members(self, name: str) -> dict[str, Value]:
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            raise _wrong(name, "must be an object", value)
        return value


def _request(fields: Fields) -> gateway_pb2.GenerateRequest:
    """What both APIs have in common; nothing of input and length."""
    request = gateway_pb2.GenerateRequest(
        model=fields.text("model"),
        sampling=_sampling(fields),
        num_choices=1 if (n := fields.integer("n", 1, MAX_CHOICES)) is None else n,
        cancel_on_disconnect="cancel_on_disconnect" not in fields or fields.flag("cancel_on_disconnect"),
        show_special_tokens="skip_special_tokens" in fields and not fields.flag("skip_special_tokens"),
    )
    rules = request.stop
    if (min_tokens := fields.integer("min_tokens", 0)) is not None:
        rules.min_tokens = min_tokens
    stop_token_ids = fields.items("stop_token_ids")
    _check_count("stop_token_ids", stop_token_ids, MAX_STOP_TOKEN_IDS)
    rules.stop_token_ids.extend(_ids("stop_token_ids", stop_token_ids))
    rules.stop.extend(_stop_strings(fields))
    rules.ignore_eos = fields.flag("ignore_eos")
    if (timeout := fields.number("timeout")) is not None:
        if not 0 < timeout < 1e9:
            raise _wrong("timeout", "must be a number of seconds above 0", timeout)
        request.timeout.FromNanoseconds(max(1, round(timeout * 1e9)))
    return request


def _sampling(fields: Fields) -> generation_pb2.SamplingParams:
    sampling = generation_pb2.SamplingParams(**{name: fields.number(name) for name in SAMPLING})  # type: ignore[arg-type]
    if (top_k := fields.integer("top_k", -1)) is not None:
        sampling.top_k = max(top_k, 0)
    if (seed := fields.integer("seed", -(1 << 63), (1 << 64) - 1)) is not None:
        sampling.seed = seed % (1 << 64)
    logit_bias = fields.members("logit_bias")
    _check_count("logit_bias", logit_bias, MAX_LOGIT_BIAS)
    for token, bias in logit_bias.items():
        if not re.fullmatch("[0-9]{1,10}", token):
            raise _wrong("logit_bias", "must map token ids, as strings of digits, to numbers", token)
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise _wrong("logit_bias", "must map token ids to numbers", bias)
        # Far outside of what is allowed all values are as wrong, and some of JSON's integers no float.
        sampling.logit_bias[_integer("logit_bias", int(token), 0)] = max(-1e30, min(1e30, bias))
    return sampling


def _stop_strings(fields: Fields) -> list[str]:
    value = fields.get("stop")
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings[: MAX_STOP_STRINGS + 1]):
        raise _wrong("stop", "must be a string or a list of strings", value)
    _check_count("stop", strings, MAX_STOP_STRINGS)
    return [_utf8("stop", each) for each in strings]


def _conversation(fields: Fields, context_length: int) -> tokenizer_pb2.ChatInput:
    if "messages" not in fields:
        raise InvalidRequest("messages is missing; it must be a list of messages", field="messages")
    go_on, begin = fields.flag("continue_final_message"), fields.get("add_generation_prompt")
    if begin is not None and begin is not (not go_on):
        raise _wrong("add_generation_prompt", "must be false with continue_final_message, and true without", begin)
    variables = fields.members("chat_template_kwargs")
    _check_count("messages", fields.items("messages"), context_length)
    return tokenizer_pb2.ChatInput(
        messages=[_message(f"messages[{i}]", each) for i, each in enumerate(fields.items("messages"))],
        template_args_json=_json("chat_template_kwargs", variables),
        continue_final_message=go_on,
    )


def _message(path: str, value: Value) -> tokenizer_pb2.ChatMessage:
    if not isinstance(value, dict):
        raise _wrong(path, "must be an object with role and content", value)
    role = value.get("role")
    if role not in ROLES:
        raise _wrong(f"{path}.role", f"must be one of {', '.join(ROLES)}", role)
    if (needed := NEEDED.get(role)) is not None and not isinstance(value.get(needed), str):
        raise _wrong(f"{path}.{needed}", f"must be a string in a message of role {role}", value.get(needed))
    more = {name: each for name, each in value.items() if name not in ("role", "content") and each is not None}
    return tokenizer_pb2.ChatMessage(
        role=role,
        content=_content(f"{path}.content", value.get("content")),
        fields_json=_json(path, more),
    )


def _content(path: str, value: Value | None) -> str:
    """The text of a message; none for a message of tool calls."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _utf8(path, value)
    if not isinstance(value, list):
        raise _wrong(path, "must be a string or a list of text parts", value)
    return "".join(_part(f"{path}[{i}]", part) for i, part in enumerate(value))


def _part(path: str, value: Value) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, dict) else value
        raise _wrong(f"{path}.type", "must be text; this model reads nothing else", kind)
    text = value.get("text")
    if not isinstance(text, str):
        raise _wrong(f"{path}.text", "must be a string", text)
    return _utf8(path, text)


def _prompts(fields: Fields, context_length: int) -> Sequence[str | list[int]]:
    value = fields.get("prompt")
    if value is None:
        raise InvalidRequest("prompt is missing; it must be text, token ids, or a list of such", field="prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _wrong("prompt", "must be text, token ids, or a list of such", value)
    if not value:
        raise InvalidRequest("prompt is empty; it must be text, token ids, or a list of such", field="prompt")
    if isinstance(value[0], int):
        return [_prompt_ids("prompt", value, context_length)]
    _check_count("prompt", value, MAX_PROMPTS)
    return [
        each if isinstance(each, str) else _prompt_ids(f"prompt[{i}]", each, context_length)
        for i, each in enumerate(value)
    ]


def _prompt_ids(name: str, value: Value, context_length: int) -> list[int]:
    if isinstance(value, list) and len(value) > context_length:
        raise InvalidRequest(
            f"{name} has {len(value)} token ids, more than the model's context, {context_length} tokens", field="prompt"
        )
    return _ids(name, value)


def _asked(fields: Fields, requests: list[gateway_pb2.GenerateRequest], *, chat: bool) -> Asked:
    options = fields.members("stream_options")
    stream = fields.flag("stream")
    if options and not stream:
        raise InvalidRequest("stream_options needs stream to be true", field="stream_options")
    if unknown := sorted(options.keys() - {"include_usage", "include_obfuscation"}):
        raise InvalidRequest(f"stream_options has no {', '.join(unknown)}", field=f"stream_options.{unknown[0]}")
    include_usage = options.get("include_usage") or False
    if not isinstance(include_usage, bool):
        raise _wrong("stream_options.include_usage", "must be true or false", include_usage)
    asked = Asked(requests, chat=chat, stream=stream, include_usage=include_usage)
    if not asked.has_cursors and not requests[0].cancel_on_disconnect:
        raise InvalidRequest(
            "cancel_on_disconnect may be false only in a stream of one prompt: of any other response nobody could read "
            "the rest",
            field="cancel_on_disconnect",
        )
    return asked


def _ids(name: str, value: Value) -> list[int]:
    if not isinstance(value, list):
        raise _wrong(name, "must be text or a list of token ids", value)
    if all(type(each) is int and 0 <= each < 1 << 32 for each in value):  # of a million none needs a name
        return value
    return [_integer(f"{name}[{i}]", each, 0) for i, each in enumerate(value)]


def _check_count(name: str, value: Sized, most: int) -> None:
    if len(value) > most:
        raise InvalidRequest(f"{name} may have at most {most} entries, not {len(value)}", field=name)


def _integer(name: str, value: Value, low: int, high: int = (1 << 32) - 1) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "must be an integer", value)
    if not low <= value <= high:
        small = high < 1 << 31 or value > high
        raise _wrong(name, f"must be from {low} to {high}" if small else f"must be at least {low}", value)
    return value


def _json(field: str, value: dict[str, Value]) -> str:
    try:
        return _utf8(field, json.dumps(value)) if value else ""
    except RecursionError as error:
        raise InvalidRequest(f"{field} is nested too deeply", field=field) from error


def _utf8(field: str, text: str) -> str:
    """The text, where it can be sent: JSON can spell halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} is not valid Unicode: an unpaired surrogate at {error.start}", field=field
        ) from error
    return text


def _wrong(name: str, right: str, value: Value | None) -> InvalidRequest:
    given = ""
    for piece in json.JSONEncoder(default=str).iterencode(value):  # of a million entries only the first are spelled
        given += piece
        if len(given) > 60:
            given = given[:60] + "..."
            break
    return InvalidRequest(f"{name} {right}, not {given}", field=name)


def _kind(value: Value) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
