"""The engine alone on a GPU: graphs, lookahead, and the way between the two executors."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.alone import engine_alone
from services.engine import build

SETTINGS = {"device": "cuda", "max_sequences": 32, "cache_blocks": 400, "block_size": 32}


def answers(folder: Path, count: int, **settings: object) -> list[list[int]]:
    """The same number of greedy answers of 200 tokens, begun together."""

    async def run() -> list[list[int]]:
        async with engine_alone(folder, SETTINGS | settings) as engine:
            return await engine.answers([[1]] * count, [200] * count)

    return asyncio.run(run())


@pytest.mark.parametrize("lookahead", [0, 1, 2, 4])
def test_the_published_text(stories260k: Path, lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, by every row of a captured step, however many steps are in flight."""
    monkeypatch.setattr(build, "GPU_LOOKAHEAD", lookahead)
    published = (stories260k / "expected_greedy_200.txt").read_text()
    found = answers(stories260k, 9, dtype="float32")
    assert all(each == found[0] for each in found)
    text = Tokenizer.from_file(str(stories260k / "tokenizer.json")).decode(found[0])
    assert os.path.commonprefix([text, published]) == published


def test_few_blocks_change_nothing(stories260k: Path) -> None:
    """Sequences that are thrown out again and again say what they would have said."""
    roomy = answers(stories260k, 9, dtype="float32")
    assert answers(stories260k, 9, dtype="float32", cache_blocks=20) == roomy
