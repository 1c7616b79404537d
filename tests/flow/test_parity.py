"""The default model's answers beside those of transformers."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from holdfast.events import Tokens
from tests.conftest import OpenBus
from tests.flow.mesh import Running, running

NUM_PROMPTS = 20
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def questions(shared: Path) -> list[str]:
    """First turns of MT-Bench, of all its categories."""
    with gzip.open(shared / "data" / "text" / "mt_bench.jsonl.gz", "rt", encoding="utf-8") as lines:
        turns: list[str] = [json.loads(line)["turns"][0] for line in lines]
    return turns[:: len(turns) // NUM_PROMPTS]


async def ask(mesh: Running, question: str) -> list[int]:
    """The ids of the answer."""
    ids: list[int] = []
    async with mesh.client.generate(
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=NUM_TOKENS,
        return_token_ids=True,
        timeout=400,
    ) as answer:
        async for event in answer:
            if isinstance(event, Tokens):
                ids += event.token_ids
    return ids


@pytest.mark.timeout(480)
async def test_chats_are_answered_as_transformers_answers_them(
    open_memory: OpenBus, smollm2: Path, questions: list[str]
) -> None:
    """In float32, every one of 64 greedy tokens, of twenty answers at once, is the one that transformers finds likeliest
    after its own rendering of the chat and the tokens before."""
    engine = {"dtype": "float32", "cache_bytes": 512 << 20, "threads": 2, "max_sequences": NUM_PROMPTS}
    async with running(open_memory, smollm2, engine=engine) as mesh:
        answers = await asyncio.gather(*[ask(mesh, question) for question in questions])

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(smollm2)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert len(answers) == NUM_PROMPTS
    for question, answer in zip(questions, answers, strict=True):
        chat = [{"role": "user", "content": question}]
        prompt: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            logits_NV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert answer == logits_NV.argmax(-1).tolist(), question
        assert len(answer) == NUM_TOKENS or answer[-1] == tokenizer.eos_token_id
