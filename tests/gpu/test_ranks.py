"""A model split over two GPUs, joined by NCCL."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from services.engine.batch import Step
from services.engine.blocks import BlockPool
from services.engine.ranks.group import RankGroup, started
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import SamplingParams, Sequence, StopRules
from services.engine.settings import EngineSettings

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")

SETTINGS = {"device": "cuda", "max_sequences": 16, "cache_blocks": 200, "block_size": 32, "tensor_parallel": 2}


def answers(folder: Path, prompts: list[list[int]], *, num_tokens: int, **settings: object) -> list[list[int]]:
    """Greedy answers, begun together."""

    async def run() -> list[list[int]]:
        async with started(EngineSettings(**SETTINGS | settings), folder) as group:  # type: ignore[arg-type]
            return await asyncio.to_thread(drive, group, prompts, num_tokens)

    return asyncio.run(run())


def drive(group: RankGroup, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    limits = Limits(max_sequences=16, max_step_tokens=256, lookahead=group.facts.lookahead)
    scheduler = Scheduler(BlockPool(group.facts.num_blocks, block_size=32), limits)
    greedy, stop = SamplingParams(temperature=0.0), StopRules(num_tokens)
    sequences = [Sequence("r", index, prompt, greedy, stop) for index, prompt in enumerate(prompts)]
    for each in sequences:
        scheduler.add(each)
    in_flight: deque[Step] = deque()
    while True:
        while len(in_flight) <= limits.lookahead and (step := scheduler.plan(0.0)):
            in_flight.append(group.launch(step))
        if not in_flight:
            return [each.output_ids for each in sequences]
        scheduler.commit(group.collect(in_flight.popleft()), 0.0)


@pytest.mark.parametrize("num_answers", [1, 9])
def test_the_published_text(stories260k: Path, num_answers: int) -> None:
    """In float32, by captured steps with the sums of both GPUs in them."""
    published = (stories260k / "expected_greedy_200.txt").read_text()
    found = answers(stories260k, [[1]] * num_answers, num_tokens=200, dtype="float32")
    assert all(each == found[0] for each in found)
    text = Tokenizer.from_file(str(stories260k / "tokenizer.json")).decode(found[0])
    assert os.path.commonprefix([text, published]) == published


def test_a_prompt_in_chunks_goes_on_alike(stories260k: Path) -> None:
    """Beside the decodes of others."""
    (whole,) = answers(stories260k, [[1]], num_tokens=100, dtype="float32")
    prompts = [[1, *whole[:count]] for count in (0, 40, 80)]
    found = answers(stories260k, prompts, num_tokens=20, dtype="float32")
    assert found == [whole[count : count + 20] for count in (0, 40, 80)]
