"""A conversation with the default model, through the whole mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from holdfast.client import Message
from holdfast.events import Finished, FinishReason, Tokens
from tests.conftest import OpenBus
from tests.flow.mesh import Running, running


@pytest.fixture
async def mesh(open_memory: OpenBus, smollm2: Path) -> AsyncIterator[Running]:
    async with running(open_memory, smollm2, engine={"cache_bytes": 128 << 20, "threads": 2}) as running_mesh:
        yield running_mesh


async def ask(mesh: Running, messages: list[Message]) -> tuple[str, Finished]:
    text = ""
    async with mesh.client.generate(messages=messages, temperature=0, max_tokens=100) as answer:
        async for event in answer:
            if isinstance(event, Tokens):
                text += event.text
            if isinstance(event, Finished):
                end = event
    return text, end


@pytest.mark.timeout(300)
async def test_a_conversation_reads_as_sense(mesh: Running) -> None:
    """Each turn ends by the model's own stop token, shows no special token, and knows what was said before."""
    messages: list[Message] = [{"role": "system", "content": "You answer in one short sentence."}]
    for question, known in (
        ("What is the capital of France?", "Paris"),
        ("What is that city famous for?", "Eiffel"),
        ("Is it larger than London?", "Paris"),
    ):
        messages.append({"role": "user", "content": question})
        text, end = await ask(mesh, messages)
        assert known in text
        assert end.reason is FinishReason.STOP
        assert "<|" not in text and text == text.strip()
        messages.append({"role": "assistant", "content": text})
    assert end.usage.cached_tokens > 0  # of the turns before
