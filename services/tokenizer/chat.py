"""Conversations to text, by a model's chat template.

Templates are Jinja written for transformers' `apply_chat_template` (huggingface/transformers,
`utils/chat_template_utils.py`), and are given what that gives them: the variables `messages`, `tools`, `documents`,
`add_generation_prompt` and the special tokens; `raise_exception`, `strftime_now` and a `tojson` that leaves HTML alone;
loop controls; the tag `generation`, which marks what a model may be trained on and renders as its body.

They come from whoever published the model, so they run in Jinja's sandbox, and nothing they are given leads out of it.
What a sandbox cannot bound, time and memory, `renderer` bounds. This module is run there: it imports nothing else of
ours.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""What the reasoning of a message is called; templates read the first, gpt-oss the second."""


class TemplateError(ValueError):
    """A template, or this conversation with it, cannot be rendered. The text says why."""


class ChatTemplates:
    """A model's templates, compiled."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises: TemplateError: a template is not valid Jinja."""
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise TemplateError(f"the chat template {name!r} is wrong in line {error.lineno}: {error}") from error

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any], *, continue_final: bool = False) -> str:
        """The prompt: the conversation, and the beginning of the model's turn, or with `continue_final` the beginning
        of the last message. `variables` may replace every other variable.

        Raises:
            TemplateError: the template refuses the conversation, or fails.
        """
        conversation = [_as_templates_expect(message) for message in messages]
        if continue_final:
            return self._render_open(conversation, variables)
        return self._render(
            conversation, variables | {"add_generation_prompt": variables.get("add_generation_prompt", True)}
        )

    def _render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        template = self._template(with_tools=variables.get("tools") is not None)
        defaults = {"tools": None, "documents": None, **self._special_tokens}
        try:
            return template.render({**defaults, **variables, "messages": messages})
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the chat template does what it must not: {error}") from error
        except _Refused as error:
            raise TemplateError(f"the chat template refuses this conversation: {error}") from error
        except RecursionError as error:
            raise TemplateError("the chat template calls itself without end") from error
        except MemoryError as error:
            raise TemplateError("the chat template needs too much memory") from error
        except Exception as error:
            raise TemplateError(f"the chat template cannot render this conversation: {error}") from error

    def _template(self, *, with_tools: bool) -> jinja2.Template:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(f"the model has chat templates {sorted(self._templates)}, and none is the default")
        return self._templates[name]

    def _render_open(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt up to the end of the last message's content: it is marked, and the text cut off at the mark."""
        mark = secrets.token_hex(16)
        last = messages[-1]
        content = last.get("content")
        if not isinstance(content, str):
            raise TemplateError("the last message has no text to continue")
        # Templates that trim a message's end also trim the blank after the mark.
        marked = [*messages[:-1], last | {"content": f"{content}{mark} "}]
        text = self._render(marked, variables | {"add_generation_prompt": False})
        before, found, after = text.rpartition(mark)
        if not found:
            raise TemplateError("the chat template leaves out the last message, so it cannot be continued")
        return before if after.startswith(" ") else before.rstrip()


def _as_templates_expect(message: dict[str, Any]) -> dict[str, Any]:
    """The message without fields that are null, which templates tell from missing ones only by failing; its reasoning
    under the names under which templates look for it."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING_NAMES if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


class _Refused(Exception):
    """What a template says is wrong with a conversation."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's namespace, whose attributes are set without the sandbox's checks: none may begin with an underscore."""

    def __init__(*args: Any, **attributes: Any) -> None:  # the signature lets an attribute be called self
        for name in dict(*args[1:], **attributes):
            _check_name(name)
        Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """`dict` without being the type, whose attributes lead to other types."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)
