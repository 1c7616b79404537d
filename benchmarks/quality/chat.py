"""Conversations that an engine has answered, as passages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.alone import engine_alone
from holdfast.errors import ConfigurationError
from services.engine.quality.passages import Passage, text_of
from services.engine.sequence import SamplingParams, StopRules
from services.engine.sequence import Sequence as Generation
from services.tokenizer import loading
from services.tokenizer.chat import ChatTemplates, TemplateError


def prompts_of(path: Path, folder: Path, *, most: int, longest: int) -> tuple[list[list[int]], int]:
    """The first conversations of a file that have at most `longest` tokens as the model's template writes them, and how
    many longer ones were passed over for them. Raises ConfigurationError where the file holds none, or the model has no
    template."""
    tokenizer = loading.load(folder)
    if not tokenizer.chat_templates:
        raise ConfigurationError(f"{folder} has no chat template; leave out --chat")
    found: list[list[int]] = []
    num_longer = 0
    try:
        templates = ChatTemplates(tokenizer.chat_templates, tokenizer.special_tokens)
        for number, line in enumerate(text_of(path).splitlines(), 1):
            text = templates.render(_messages(line, where=f"{path}, line {number}"), {})
            ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
            if len(ids) <= longest:
                found.append(ids)
            else:
                num_longer += 1
            if len(found) == most:
                break
    except TemplateError as error:
        raise ConfigurationError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ConfigurationError(
            f"{path} has no conversation of at most {longest:,} tokens: raise --window, or lower --answer"
        )
    return found, num_longer


def _messages(line: str, *, where: str) -> list[dict[str, Any]]:
    """The conversation up to the first answer."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where}: not JSON: {error}") from error
    match given:
        case {"messages": [*messages]} if all(isinstance(each, dict) for each in messages):
            return messages
        case {"turns": [str(text), *_]} | {"question": str(text)} | {"prompt": str(text)}:
            return [{"role": "user", "content": text}]
    raise ConfigurationError(
        f"{where}: no conversation; it must be an object with `messages`, or with `turns`, `question` or `prompt` as text"
    )


def answered(
    prompts: Sequence[list[int]], folder: Path, settings: Mapping[str, object], *, most_tokens: int
) -> list[Passage]:
    """Each prompt with the greedy answer of an engine of these settings, which alone is judged. It ends with the token by which
    the model ends it, or after so many."""
    ends = frozenset(loading.load(folder).eos_token_ids)
    answers = [_generation(str(index), prompt, most_tokens, ends) for index, prompt in enumerate(prompts)]

    async def answer() -> None:
        async with engine_alone(folder, settings) as engine, asyncio.TaskGroup() as tasks:
            for each in answers:
                tasks.create_task(engine.end_of(each))

    asyncio.run(answer())
    return [
        Passage([*prompt, *each.output_ids], first=len(prompt)) for prompt, each in zip(prompts, answers, strict=True)
    ]


def _generation(name: str, prompt: list[int], most_tokens: int, ends: frozenset[int]) -> Generation:
    return Generation(
        request_id=name,
        choice=0,
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        stop=StopRules(max_tokens=most_tokens, stop_token_ids=ends),
        arrival=time.time(),
    )
