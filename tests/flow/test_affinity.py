"""Prompts that begin alike, on two real engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.client import Client
from holdfast.events import Finished
from tests.conftest import OpenBus
from tests.flow.mesh import running

PREFIX = [1, *range(300, 460)]
NUM_REQUESTS = 6


async def cached_tokens(client: Client, prompt: list[int]) -> int:
    """How many of a prompt's tokens its engine had already."""
    async with client.generate(token_ids=prompt, max_tokens=2, ignore_eos=True) as answer:
        events = [event async for event in answer]
    assert isinstance(events[-1], Finished)
    return events[-1].usage.cached_tokens


@pytest.mark.parametrize(("affinity_tokens", "num_missed"), [(128, 1), (0, 2)])
async def test_an_engine_finds_the_prefix_that_it_has(
    open_memory: OpenBus, stories260k: Path, affinity_tokens: int, num_missed: int
) -> None:
    """With affinity the second prompt already meets the engine that has computed their common beginning; without, each
    engine computes it."""
    settings = {"affinity_tokens": affinity_tokens}
    async with running(open_memory, stories260k, gateway=settings, num_engines=2) as mesh:
        found = [await cached_tokens(mesh.client, [*PREFIX, 400 + number]) for number in range(NUM_REQUESTS)]
    assert [tokens > 0 for tokens in found] == [False] * num_missed + [True] * (NUM_REQUESTS - num_missed)
    assert all(tokens >= 128 for tokens in found[num_missed:])
