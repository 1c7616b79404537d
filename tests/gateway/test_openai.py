"""The OpenAI API's requests as ours."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatOfOpenAI
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionOfOpenAI

from holdfast.errors import InvalidRequest
from holdfast.v1 import gateway_pb2 as pb
from services.gateway.openai import (
    CHAT,
    COMPLETION,
    IGNORED,
    NEUTRAL,
    ROLES,
    Asked,
    param,
    read_chat,
    read_completion,
    read_json,
)

CONTEXT = 200
HI = [{"role": "user", "content": "hi"}]


def chat(**parameters: Any) -> Asked:
    return read_chat({"messages": HI} | parameters, CONTEXT)


def completion(**parameters: Any) -> Asked:
    return read_completion({"prompt": "hi"} | parameters, CONTEXT)


def refused(read: Callable[..., Asked], **parameters: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**parameters)
    return caught.value


def test_every_parameter_finds_its_field() -> None:
    """What the two APIs have in common becomes sampling parameters and stop rules."""
    common = {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 3,
        "stop": ["a", "b"],
        "seed": -1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": -100, "6": 2.5},
        "max_tokens": 9,
        "top_k": 40,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "timeout": 1.5,
        "cancel_on_disconnect": False,
        "stream": True,
    }
    for asked in (chat(**common), completion(**common)):
        (request,) = asked.requests
        sampling, rules = request.sampling, request.stop
        assert (request.model, request.num_choices, asked.num_choices) == ("m", 3, 3)
        assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 40, 0.25)
        assert sampling.top_p == pytest.approx(0.9)
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
        assert dict(sampling.logit_bias) == {5: -100, 6: 2.5}
        assert sampling.seed == (1 << 64) - 1
        assert not sampling.HasField("logprobs")
        assert (rules.max_tokens, rules.min_tokens, rules.ignore_eos) == (9, 2, True)
        assert (list(rules.stop), list(rules.stop_token_ids)) == (["a", "b"], [7, 8])
        assert request.timeout.ToMilliseconds() == 1500
        assert (request.show_special_tokens, request.cancel_on_disconnect, asked.stream) == (True, False, True)


def test_what_is_left_out_is_left_open() -> None:
    """Without parameters the request says nothing, but that it ends with its connection; a completion has 16 tokens."""
    (request,) = chat().requests
    assert request.chat.messages[0].role == "user"
    request.ClearField("chat")
    assert request == pb.GenerateRequest(
        sampling=request.sampling, stop=request.stop, num_choices=1, cancel_on_disconnect=True
    )
    assert request.sampling.ByteSize() == request.stop.ByteSize() == 0
    assert chat().default_max_tokens is None
    assert (completion().default_max_tokens, completion().requests[0].stop.HasField("max_tokens")) == (16, False)
    assert completion(min_tokens=20).default_max_tokens == 20


def test_null_is_as_if_it_was_not_there() -> None:
    """A parameter that is null, supported or not, is left out."""
    assert chat(temperature=None, tools=None, audio=None, stream=None).requests == chat().requests
    assert completion(suffix=None, max_tokens=None).requests == completion().requests


def test_minus_one_and_zero_keep_all_tokens() -> None:
    """top_k -1 and 0 mean what other servers mean by them: all."""
    for top_k in (-1, 0):
        sampling = chat(top_k=top_k).requests[0].sampling
        assert sampling.HasField("top_k") and sampling.top_k == 0


def test_both_names_of_the_longest_answer_are_known() -> None:
    """max_tokens and max_completion_tokens mean the same in a chat; of both the smaller counts."""
    assert chat(max_completion_tokens=5).requests[0].stop.max_tokens == 5
    assert chat(max_tokens=4, max_completion_tokens=5).requests[0].stop.max_tokens == 4
    assert refused(completion, max_completion_tokens=5).field == "max_completion_tokens"


def test_each_api_has_its_log_probabilities() -> None:
    """A chat says logprobs and top_logprobs, a completion a number."""
    assert chat(logprobs=True).requests[0].sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).requests[0].sampling.logprobs == 3
    assert not chat(logprobs=False).requests[0].sampling.HasField("logprobs")
    assert completion(logprobs=2).requests[0].sampling.logprobs == 2
    assert completion(logprobs=0).requests[0].sampling.HasField("logprobs")


def test_messages_keep_what_templates_read() -> None:
    """Content may be text, text parts, or nothing; other fields go to the template, and so do its variables."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "name": None},
    ]
    asked = read_chat(
        {
            "messages": messages,
            "chat_template_kwargs": {"enable_thinking": False},
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        CONTEXT,
    )
    conversation = asked.requests[0].chat
    assert [message.content for message in conversation.messages] == ["Be kind.", ""]
    assert conversation.messages[0].fields_json == ""
    assert json.loads(conversation.messages[1].fields_json) == {"tool_calls": [{"id": "1"}]}
    assert json.loads(conversation.template_args_json) == {"enable_thinking": False}
    assert conversation.continue_final_message


def test_the_roles_of_openai_go_to_the_template() -> None:
    """Each by its own name, developer too, with what it must say."""
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
        {"role": "function", "content": "e", "name": "f"},
    ]
    conversation = chat(messages=messages).requests[0].chat
    assert [message.role for message in conversation.messages] == list(ROLES)
    assert json.loads(conversation.messages[4].fields_json) == {"tool_call_id": "1"}


def test_prompts_come_in_four_forms() -> None:
    """Text, several texts, ids, several lists of ids: a request for each prompt, otherwise the same."""
    assert [request.prompt for request in completion(prompt="a").requests] == ["a"]
    several = completion(prompt=["a", "b"], seed=3).requests
    assert [(request.prompt, request.sampling.seed) for request in several] == [("a", 3), ("b", 3)]
    assert [list(request.token_ids.ids) for request in completion(prompt=[1, 2]).requests] == [[1, 2]]
    mixed = completion(prompt=[[1, 2], "a"]).requests
    assert (list(mixed[0].token_ids.ids), mixed[1].prompt) == ([1, 2], "a")


def test_streams_may_tell_their_usage() -> None:
    """stream_options.include_usage is read; include_obfuscation changes nothing."""
    asked = chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert (asked.stream, asked.include_usage) == (True, True)
    assert not chat(stream=True).include_usage


def test_what_cannot_change_the_answer_is_ignored() -> None:
    """Parameters that say who asks, what may be kept, and how fast it is to be, whatever their value."""
    for name in IGNORED:
        assert chat(**{name: {"any": "thing"}}).requests == chat().requests


@pytest.mark.parametrize(
    ("read", "parameters"),
    [
        (chat, {"tools": []}),
        (chat, {"tool_choice": "none", "parallel_tool_calls": True}),
        (chat, {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"}),
        (completion, {"echo": False, "suffix": "", "best_of": 1}),
        (completion, {"best_of": 2, "n": 2}),
    ],
)
def test_a_value_that_changes_nothing_is_accepted(read: Callable[..., Asked], parameters: Mapping[str, Any]) -> None:
    """Unsupported parameters may be there with the value that means they are not used."""
    read(**parameters)


def test_the_openai_package_has_no_parameter_that_is_not_known() -> None:
    """Each is read, ignored, or not supported, by name."""
    known = IGNORED | NEUTRAL.keys()
    of_chat = {*ChatOfOpenAI.__required_keys__, *ChatOfOpenAI.__optional_keys__}
    of_completion = {*CompletionOfOpenAI.__required_keys__, *CompletionOfOpenAI.__optional_keys__}
    assert of_chat <= known | CHAT
    assert of_completion <= known | COMPLETION


@pytest.mark.parametrize(
    ("read", "parameters", "field", "says"),
    [
        (chat, {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (chat, {"tool_choice": "required"}, "tool_choice", "not supported"),
        (chat, {"functions": [{}]}, "functions", "not supported"),
        (chat, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (chat, {"modalities": ["text", "audio"]}, "modalities", "not supported"),
        (chat, {"audio": {"voice": "a"}}, "audio", "not supported"),
        (chat, {"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        (chat, {"verbosity": "low"}, "verbosity", "not supported"),
        (chat, {"prompt": "hi"}, "prompt", "not known"),
        (completion, {"messages": HI}, "messages", "not known"),
        (completion, {"echo": True}, "echo", "not supported"),
        (completion, {"suffix": "end"}, "suffix", "not supported"),
        (completion, {"best_of": 2}, "best_of", "not supported"),
        (completion, {"top_logprobs": 2}, "top_logprobs", "not known"),
        (chat, {"temprature": 1}, "temprature", "not known"),
        (chat, {"temperature": "hot"}, "temperature", 'must be a number, not "hot"'),
        (chat, {"temperature": True}, "temperature", "must be a number"),
        (chat, {"temperature": 10**400}, "temperature", "is too large"),
        (chat, {"n": 0}, "n", "from 1 to 128, not 0"),
        (chat, {"n": 1.5}, "n", "an integer, not 1.5"),
        (chat, {"n": 129}, "n", "from 1 to 128"),
        (chat, {"max_tokens": 0}, "max_tokens", "at least 1"),
        (chat, {"max_tokens": -5}, "max_tokens", "at least 1, not -5"),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        (completion, {"max_tokens": True}, "max_tokens", "an integer"),
        (chat, {"top_k": -2}, "top_k", "at least -1"),
        (chat, {"seed": 1 << 64}, "seed", "from"),
        (chat, {"stream": "yes"}, "stream", "true or false"),
        (chat, {"stop": [1]}, "stop", "a string or a list of strings"),
        (chat, {"stop": {"a": 1}}, "stop", "a string or a list of strings"),
        (chat, {"stop_token_ids": [-1]}, "stop_token_ids[0]", "at least 0"),
        (chat, {"stop_token_ids": 7}, "stop_token_ids", "a list"),
        (chat, {"logit_bias": [1]}, "logit_bias", "an object"),
        (chat, {"logit_bias": {"x": 1}}, "logit_bias", "strings of digits"),
        (chat, {"logit_bias": {"99999999999": 1}}, "logit_bias", "strings of digits"),
        (chat, {"logit_bias": {"5": "a"}}, "logit_bias", "to numbers"),
        (chat, {"logprobs": 1}, "logprobs", "true or false"),
        (chat, {"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (chat, {"stream": True, "stream_options": {"speed": 1}}, "stream_options.speed", "has no speed"),
        (
            chat,
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "true or false",
        ),
        (chat, {"timeout": 0}, "timeout", "above 0"),
        (chat, {"timeout": math.nan}, "timeout", "above 0"),
        (chat, {"chat_template_kwargs": "x"}, "chat_template_kwargs", "an object"),
        (chat, {"add_generation_prompt": False}, "add_generation_prompt", "true without"),
        (chat, {"messages": None}, "messages", "missing"),
        (chat, {"messages": "hi"}, "messages", "a list"),
        (chat, {"messages": ["hi"]}, "messages[0]", "an object with role and content"),
        (chat, {"messages": [{"content": "hi"}]}, "messages[0].role", "must be one of system, developer, user"),
        (chat, {"messages": [{"role": 1}]}, "messages[0].role", "not 1"),
        (chat, {"messages": [{"role": []}]}, "messages[0].role", "not []"),
        (chat, {"messages": [{"role": "martian", "content": "hi"}]}, "messages[0].role", 'not "martian"'),
        (chat, {"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id", "must be a string"),
        (chat, {"messages": [{"role": "function", "content": "5"}]}, "messages[0].name", "must be a string"),
        (chat, {"messages": [*HI, {"role": "user", "content": 5}]}, "messages[1].content", "text parts"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            'must be text; this model reads nothing else, not "image_url"',
        ),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "a string",
        ),
        (chat, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "unpaired surrogate"),
        (completion, {"prompt": None}, "prompt", "missing"),
        (completion, {"prompt": []}, "prompt", "prompt is empty; it must be text, token ids, or a list of such"),
        (completion, {"prompt": 5}, "prompt", "text, token ids"),
        (completion, {"prompt": [1, -2]}, "prompt[1]", "prompt[1] must be at least 0, not -2"),
        (completion, {"prompt": ["a", [1, -2]]}, "prompt[1][1]", "prompt[1][1] must be at least 0, not -2"),
        (completion, {"prompt": [[1], {}]}, "prompt[1]", "a list of token ids"),
        (completion, {"prompt": [1, True]}, "prompt[1]", "an integer"),
        (completion, {"prompt": ["a"] * 129}, "prompt", "at most 128 entries"),
        (completion, {"prompt": [0] * 201}, "prompt", "201 token ids, more than the model's context, 200 tokens"),
        (completion, {"prompt": ["a", [0] * 201]}, "prompt", "prompt[1] has 201 token ids"),
        (chat, {"messages": HI * 201}, "messages", "at most 200 entries, not 201"),
        (chat, {"stop": ["a"] * 17}, "stop", "at most 16 entries"),
        (chat, {"stop_token_ids": [0] * 1025}, "stop_token_ids", "at most 1024 entries"),
        (chat, {"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024 entries"),
        (chat, {"seed": [0] * 99}, "seed", "0, 0,..."),
        (completion, {"prompt": "\udfff"}, "prompt", "unpaired surrogate"),
        (completion, {"logprobs": True}, "logprobs", "an integer"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    read: Callable[..., Asked], parameters: Mapping[str, Any], field: str, says: str
) -> None:
    """A parameter that is unknown, unsupported or of the wrong type is named, with what would be right."""
    error = refused(read, **parameters)
    assert error.field == field
    assert says in str(error)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8: invalid start byte at byte 0"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"null", "not null"),
        (b"5", "not a number"),
        (b'"x"', "not a string"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"n": ' + b"9" * 6000 + b"}", "a number with too many digits: more than 4300"),
    ],
)
def test_a_body_must_be_a_json_object(body: bytes, says: str) -> None:
    """What is no JSON object is refused, and the refusal says how."""
    with pytest.raises(InvalidRequest) as caught:
        read_json(body)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("field", "chat_name", "completion_name"),
    [
        ("sampling.temperature", "temperature", "temperature"),
        ("sampling.logprobs", "top_logprobs", "logprobs"),
        ("stop.stop", "stop", "stop"),
        ("stop.max_tokens", "max_tokens", "max_tokens"),
        ("num_choices", "n", "n"),
        ("chat.messages[1].role", "messages[1].role", "messages[1].role"),
        ("chat.template_args_json", "chat_template_kwargs", "chat_template_kwargs"),
        ("input", "messages", "prompt"),
        ("token_ids.ids", "messages", "prompt"),
        ("timeout", "timeout", "timeout"),
    ],
)
def test_fields_have_their_names_in_each_api(field: str, chat_name: str, completion_name: str) -> None:
    """A refusal names the parameter that the client knows."""
    assert (param(field, chat=True), param(field, chat=False)) == (chat_name, completion_name)


class Unread(list[Any]):
    """A list that nobody may walk."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it was walked")


@pytest.mark.parametrize("parameters", [{"prompt": Unread([0] * 201)}, {"stop_token_ids": Unread([0] * 1025)}])
def test_a_list_that_is_too_long_is_not_walked(parameters: dict[str, Any]) -> None:
    """Its length is enough to refuse it, and a million entries would hold up every stream."""
    assert refused(completion, **parameters).field in parameters


def test_a_messages_list_that_is_too_long_is_not_walked() -> None:
    """Nor is a conversation."""
    assert refused(chat, messages=Unread(HI * 201)).field == "messages"


def test_what_is_nested_too_deeply_to_be_sent_on_is_refused() -> None:
    """Though it could be read."""
    nested: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        nested = [nested]
    assert "nested too deeply" in str(refused(chat, chat_template_kwargs={"a": nested}))
