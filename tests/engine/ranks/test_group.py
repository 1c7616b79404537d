"""An engine whose model is split over two processes, and what becomes of it when one of them dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast import topics
from holdfast.errors import ConfigurationError, InternalError
from holdfast.memory import MemoryBus
from holdfast.v1 import generation_pb2 as pb
from services.engine.batch import Admission, Growth, Step, Work
from services.engine.ranks.group import RankGroup, started
from services.engine.settings import EngineSettings
from tests.engine.ranks.processes import gone, ranks_of
from tests.engine.records import answers, publish
from tests.engine.slots import sequence
from tests.engine.test_end_to_end import BOS, engine, published, story

__all__ = ["published"]  # a fixture


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus() as opened:
        await opened.create_topics(topics.TOPICS)
        yield opened


@asynccontextmanager
async def group(folder: Path, **more: Any) -> AsyncIterator[RankGroup]:
    """Two ranks alone."""
    given = {"device": "cpu", "threads": 1, "block_size": 16, "cache_bytes": 1 << 20, "tensor_parallel": 2, **more}
    async with started(EngineSettings(**given), folder) as ranks:
        yield ranks


def step(number: int, *, block: int = 0) -> Step:
    """One that takes in a sequence and samples its first token."""
    admission = Admission.of(sequence([BOS, 5, 6]), 0)
    return Step(number, (Work(0, 0, 3, True),), (admission,), (Growth(0, 0, (block,)),), (0,) if number > 1 else ())


async def test_the_published_text_is_what_two_ranks_say(
    bus: MemoryBus, stories260k: Path, published: list[int]
) -> None:
    """Beside a choice that is drawn as one rank draws it. The ranks end with the engine."""
    drawn = pb.SamplingParams(temperature=1.0, top_p=0.9, seed=7, logprobs=2)
    async with answers(bus) as heard:
        async with engine(bus, stories260k, tensor_parallel=2):
            ranks = ranks_of()
            await publish(bus, story("a", [BOS], max_tokens=len(published)))
            await publish(bus, story("b", [BOS, *published[:100]], max_tokens=40))
            await publish(bus, story("c", [BOS], max_tokens=20, sampling=drawn))
            await heard.finished("a", "b", "c")
        assert len(ranks) == 2
        await gone(ranks)
        assert heard["a"].token_ids == published
        assert heard["b"].token_ids == published[100:140]
        async with engine(bus, stories260k):
            await publish(bus, story("d", [BOS], max_tokens=20, sampling=drawn))
            await heard.finished("d")
        assert heard["c"].token_ids == heard["d"].token_ids


async def test_a_block_is_the_parts_of_its_ranks(stories260k: Path) -> None:
    """What was written is read again, and what a step computed moves to another block. Then a rank is killed while its
    part of a step is waited for: it is named, and nothing of the others is left."""
    with pytest.RaisesGroup(
        pytest.RaisesExc(InternalError, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"), flatten_subgroups=True
    ):
        async with group(stories260k) as ranks:
            size = 2 * ranks.facts.layout.block_bytes
            content = random.Random(0).randbytes(size)
            ranks.write_block(3, content)
            with pytest.raises(ValueError, match=f"a block of this cache has {size} bytes, not 5"):
                ranks.write_block(3, b"short")
            first = ranks.collect(ranks.launch(step(1)))
            assert await asyncio.to_thread(ranks.read_block, 3) == content
            computed = ranks.read_block(0)
            ranks.write_block(4, computed)
            assert ranks.read_block(4) == computed != content
            decode = Step(2, (Work(0, 2, 1, True),), grown=(Growth(0, 0, (4,)),))
            assert ranks.collect(ranks.launch(decode)).token_ids == first.token_ids
            pids = ranks_of()
            os.kill(pids[1], signal.SIGSTOP)
            collecting = asyncio.create_task(asyncio.to_thread(ranks.collect, ranks.launch(step(3))))
            os.kill(pids[1], signal.SIGKILL)
            with pytest.raises(InternalError, match=rf"^rank 1 \(pid {pids[1]}\) was killed by SIGKILL$"):
                await asyncio.shield(collecting)
            await asyncio.Event().wait()
    await gone(pids)


async def test_an_error_in_a_rank_is_told_with_its_rank(stories260k: Path) -> None:
    """The last one, in its own words."""
    with pytest.RaisesGroup(InternalError, flatten_subgroups=True):
        async with group(stories260k) as ranks:
            pids = ranks_of()
            with pytest.raises(InternalError, match=r"^rank [01] \(pid \d+\) failed: IndexError: .*out of bounds"):
                ranks.collect(ranks.launch(step(1, block=10_000)))
            await asyncio.Event().wait()
    await gone(pids)


async def test_what_a_rank_refuses_the_front_refuses(bus: MemoryBus, stories260k: Path) -> None:
    """As the same error, once; the ranks are gone."""
    with pytest.raises(ConfigurationError, match="^tensor_parallel is 3, but the model's 4 key-value heads cannot be"):
        async with engine(bus, stories260k, tensor_parallel=3):
            pass
    assert ranks_of() == []
