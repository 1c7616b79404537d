"""The deterministic mode: what a request hears does not depend on what else the engine computes. Some 60 seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.sequence import SamplingParams, Sequence, StopRules
from tests.engine.test_deterministic import WISHES
from tests.engine.test_model_runner import Engine
from tests.gpu.test_engine import MIXTURE

RUNS = 1000
PROMPT = [(7 * i * i + 3 * i) % 490 for i in range(75)]


@pytest.fixture
def folder(shared: Path, tmp_path: Path, device: str) -> Path:
    """Qwen3-0.6B's shape with random weights; a small one where a CPU only proves these tests."""
    config = json.loads((shared / "data" / "configs" / "Qwen3-0.6B" / "config.json").read_text())
    if device == "cpu":
        config |= {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def engine(folder: Path, device: str, **options: Any) -> Engine:
    given = {"dtype": "bfloat16", "load_format": "dummy", "deterministic": True, "max_model_len": 256, **options}
    return Engine(folder, device=device, lookahead=2 if device == "cuda" else 0, **given)


def asked(wish: dict[str, Any], prompt_ids: list[int], max_tokens: int = 12) -> Sequence:
    return Sequence("r", 0, prompt_ids, SamplingParams(**wish), StopRules(max_tokens))


def mates(count: int) -> list[Sequence]:
    """Greedy ones and others, of all lengths; some begin like the prompt."""
    draw = random.Random(1)
    starts = [PROMPT[: draw.choice([0, 0, 20, 50])] for _ in range(count)]
    return [
        asked(
            draw.choice(WISHES),
            [*start, *(draw.randrange(490) for _ in range(draw.randint(1, 120)))],
            draw.randint(1, 30),
        )
        for start in starts
    ]


def test_a_thousand_runs_under_random_load_are_one(folder: Path, device: str) -> None:
    """One prompt, greedy, among others, in a cache too small for all: one answer, that of a run alone, however much of it is
    wanted; of every tenth run log-probabilities tell that to the last bit.

    Copies of it are thrown out whatever the pace: as many as there are slots come first and want 100 tokens. One is admitted
    where each that runs still finds a block; each takes 6 after its prompt's, and gives none back before it ends.
    """
    slots, blocks, runs, others = (32, 130, RUNS, 300) if device == "cuda" else (8, 34, 20, 12)
    options = {"max_sequences": slots, "max_step_tokens": 200, "num_blocks": blocks}
    expected, *same = (
        asked({"temperature": 0.0, "logprobs": 0 if number % 10 == 0 else None}, PROMPT, 100 if number <= slots else 12)
        for number in range(runs + 1)
    )
    engine(folder, device, **options).run(expected)
    crowd = [*same[slots:], *mates(others)]
    random.Random(2).shuffle(crowd)
    crowded = engine(folder, device, **options)
    crowded.run(*same[:slots], *crowd)
    for each in same:
        assert each.output_ids == expected.output_ids[: each.stop.max_tokens]
        if each.sampling.logprobs is not None:
            assert each.output_logprobs == expected.output_logprobs[: each.stop.max_tokens]
    assert crowded.scheduler.totals.num_preemptions > 0
    assert any(each.num_cached for each in same) and any(not each.num_cached for each in same)


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "experts"])
def test_log_probabilities_are_the_same_to_the_last_bit(
    folder: Path, tmp_path: Path, device: str, mixture: bool
) -> None:
    """Greedy, seeded and edited, alone or among others, in chunks of any size, captured or not."""
    if mixture:
        (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    wishes = [{**wish, "logprobs": 3} for wish in WISHES]
    alone = engine(folder, device, max_step_tokens=512, prefix_cache=False)
    expected = [asked(wish, PROMPT) for wish in wishes]
    for each in expected:
        alone.run(each)
    for max_step_tokens in (9, 100, 3000):
        found, others = [asked(wish, PROMPT) for wish in wishes], mates(12)
        engine(folder, device, max_step_tokens=max_step_tokens, num_blocks=200).run(*others[:6], *found, *others[6:])
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.output_ids == theirs.output_ids
            assert mine.output_logprobs == theirs.output_logprobs


def test_a_row_is_multiplied_alike_in_any_place() -> None:
    """In bfloat16 and float32, on real widths: the same bits alone, first, or in the middle of thousands of rows."""
    from services.engine.ops.kernels import invariant

    for dtype in (torch.bfloat16, torch.float32):
        for outputs, inputs in ((4096, 1024), (1024, 3072), (151936, 1024), (100, 172)):
            num_rows = 2500 if outputs < 100000 else 200
            x = torch.randn(num_rows, inputs, device="cuda", dtype=dtype)
            weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype) * inputs**-0.5
            whole = invariant.matmul(x, weight)
            expected = x[:50].double() @ weight.double().T
            error = 2e-2 if dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(whole[:50].double(), expected, atol=error, rtol=error)
            for start, count in ((0, 1), (37, 1), (100, 17), (63, 130), (num_rows - 1, 1)):
                rows = slice(start, start + count)
                assert torch.equal(invariant.matmul(x[rows].clone(), weight), whole[rows])
