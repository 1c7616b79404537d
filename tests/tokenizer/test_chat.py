"""Conversations to text."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from services.tokenizer.chat import ChatTemplates, TemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

USER = {"role": "user", "content": "Is <b>1 & 2</b> 'é' 你好? "}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": " Yes,  "}
CALL = {"type": "function", "id": "abc123def", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "name": "get_weather", "content": '{"celsius": 20}'}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "<a> & b"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": CITY}}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], bool]] = {
    "one message": ([USER], {}, False),
    "three turns": ([SYSTEM, USER, ASSISTANT, USER], {}, False),
    "tools": ([SYSTEM, USER, CALLING, RESULT], {"tools": [TOOL]}, False),
    "reasoning": ([USER, ASSISTANT | {"reasoning_content": "Well."}, USER], {"enable_thinking": False}, False),
    "a message to continue": ([USER, ASSISTANT], {}, True),
}


def rendered(source: str, messages: list[dict[str, Any]], *, continue_final: bool = False, **variables: Any) -> str:
    """A conversation by a template."""
    return ChatTemplates({"default": source}, SPECIAL).render(messages, variables, continue_final=continue_final)


@pytest.fixture(scope="session")
def templates(shared: Path) -> dict[str, str]:
    """The templates of some sixty models."""
    folder = shared / "data" / "tokenizers" / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_templates_render_as_transformers_renders_them(conversation: str, templates: dict[str, str]) -> None:
    """Each real template gives the text that transformers gives, and fails where that fails."""
    messages, variables, continue_final = CONVERSATIONS[conversation]
    num_rendered = 0
    for name, source in templates.items():
        theirs = _by_transformers(source, messages, variables, continue_final=continue_final)
        if theirs is None:
            with pytest.raises(TemplateError, match="the chat template"):
                rendered(source, messages, continue_final=continue_final, **variables)
        else:
            assert rendered(source, messages, continue_final=continue_final, **variables) == theirs, name
            num_rendered += 1
    assert num_rendered >= 0.6 * len(templates) > 36


def _by_transformers(
    source: str, messages: list[dict[str, Any]], variables: dict[str, Any], *, continue_final: bool
) -> str | None:
    """What transformers' `apply_chat_template` gives; nothing where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, which it looks for
        from transformers.utils.chat_template_utils import render_jinja_template
    without_null = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        texts, _ = render_jinja_template(
            conversations=[without_null],
            chat_template=source,
            add_generation_prompt=not continue_final,
            continue_final_message=continue_final,
            **SPECIAL,
            **variables,
        )
    except Exception:  # noqa: BLE001 - whatever a template raises
        return None
    return str(texts[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ''['__cl' + 'ass__'] | attr('__mro__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ dict.__call__.__func__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('{0.__class__}' | format).format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include '/etc/passwd' %}",
        "{% extends 'base' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    """What reaches for Python's insides, changes what it is given, or counts too far, is refused."""
    try:
        text = rendered(source, [USER])
    except TemplateError:
        return
    assert "class" not in text and "0x" not in text  # an undefined name renders as nothing


def test_a_templates_own_objection_is_told() -> None:
    """`raise_exception` becomes an error with its text."""
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role, please') }}{% endif %}"
    with pytest.raises(TemplateError, match="refuses this conversation: No system role, please"):
        rendered(source, [SYSTEM])


def test_a_template_that_is_no_jinja_is_refused_at_once() -> None:
    """The error names the template and the line."""
    with pytest.raises(TemplateError, match="'default' is wrong in line 2"):
        ChatTemplates({"default": "a\n{% if %}"}, {})


def test_tools_take_the_template_for_tools() -> None:
    """Of several templates, the one called tool_use renders conversations with tools, the default all others."""
    templates = ChatTemplates({"default": "plain", "tool_use": "with {{ tools | length }}"}, {})
    assert templates.render([USER], {}) == "plain"
    assert templates.render([USER], {"tools": [TOOL]}) == "with 1"
    with pytest.raises(TemplateError, match="none is the default"):
        ChatTemplates({"rag": "x"}, {}).render([USER], {})


def test_a_continued_message_ends_where_its_text_ends() -> None:
    """Nothing follows the last message's text; blanks at its end are kept where the template keeps them."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<>{% endif %}"
    )
    trimming = source.replace("m.content", "m.content | trim")
    assert rendered(source, [USER, ASSISTANT], continue_final=True).endswith("<assistant> Yes,  ")
    assert rendered(trimming, [USER, ASSISTANT], continue_final=True).endswith("<assistant>Yes,")
    assert rendered(source, [USER, ASSISTANT]).endswith("Yes,  </><>")


def test_what_cannot_be_continued_is_refused() -> None:
    """A last message without text, or one that the template leaves out, has no end to go on from."""
    with pytest.raises(TemplateError, match="no text to continue"):
        rendered("{{ messages }}", [USER, CALLING], continue_final=True)
    with pytest.raises(TemplateError, match="leaves out the last message"):
        rendered("{{ messages[0].content }}", [USER, ASSISTANT], continue_final=True)


def test_variables_may_replace_what_templates_get_by_default() -> None:
    """Special tokens and add_generation_prompt are variables like others."""
    source = "{{ bos_token }}{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}"
    assert rendered(source, [USER]) == "<s>TrueTrueTrue"
    assert rendered(source, [USER], bos_token="", add_generation_prompt=False) == "FalseTrueTrue"


def test_the_generation_tag_renders_as_its_body() -> None:
    """What marks the text to be trained on changes nothing here, loops and their controls inside it included."""
    body = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert rendered(f"{{% generation %}}{body}{{% endgeneration %}}", [USER]) == "01"


def test_json_keeps_its_characters() -> None:
    """tojson escapes neither HTML nor what is not ASCII, unless told to."""
    source = "{{ messages[0] | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}"
    text = rendered(source, [USER])
    assert text == '{"role": "user", "content": "Is <b>1 & 2</b> \'é\' 你好? "}{\n "a": 2,\n "b": 1\n}'
