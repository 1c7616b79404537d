"""The engine alone on a GPU: graphs, lookahead, and the way between the two executors."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.alone import engine_alone
from services.engine import build
from services.engine.loop import Runner
from services.engine.model_runner import Launched

SETTINGS = {"device": "cuda", "max_sequences": 32, "cache_blocks": 400, "block_size": 32}

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
"""A small one, with a layer without experts."""


def as_built(runner: Runner[Launched]) -> Runner[Launched]:
    return runner


def answers(
    folder: Path, count: int, *, around: Callable[[Runner[Launched]], Runner[Launched]] = as_built, **settings: object
) -> list[list[int]]:
    """The same number of greedy answers of 200 tokens, begun together."""

    async def run() -> list[list[int]]:
        async with engine_alone(folder, SETTINGS | settings, around=around) as engine:
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


def test_a_mixture_of_experts_says_captured_what_it_says_uncaptured(tmp_path: Path) -> None:
    """In float32, nine at a time: in graphs, and operation by operation."""
    from tests.engine.executors import captured, uncaptured  # needs Triton

    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    found, expected = (
        answers(tmp_path, 9, around=alone, dtype="float32", load_format="dummy") for alone in (captured, uncaptured)
    )
    assert found == expected
    assert len(set(found[0])) > 1


@pytest.mark.parametrize("rules", ["fp8_e4m3", "int8", "0=auto,-1=int8,fp8_e4m3"])
def test_stories_in_8_bits(stories260k: Path, rules: str) -> None:
    """Every row of a captured step tells the same story, which begins like the published one."""
    published = (stories260k / "expected_greedy_200.txt").read_text()
    found = answers(stories260k, 9, dtype="float32", block_size=64, kv_cache_dtype=rules)
    assert all(each == found[0] for each in found)
    text = Tokenizer.from_file(str(stories260k / "tokenizer.json")).decode(found[0])
    assert text[:60] == published[:60]


def test_few_blocks_change_nothing(stories260k: Path) -> None:
    """Sequences that are thrown out again and again say what they would have said."""
    roomy = answers(stories260k, 9, dtype="float32")
    assert answers(stories260k, 9, dtype="float32", cache_blocks=20) == roomy
