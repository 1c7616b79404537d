"""An engine whose model is split over two processes, and what becomes of it when one of them dies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from holdfast.errors import ConfigurationError, InternalError
from holdfast.memory import MemoryBus
from holdfast.v1 import generation_pb2 as pb
from services.engine.batch import Admission, Growth, Step, Work
from services.engine.ranks.group import RankGroup, started
from services.engine.settings import EngineSettings
from tests.engine.ranks.processes import gone, ranks_of
from tests.engine.records import answers, publish
from tests.engine.slots import sequence
from tests.engine.test_end_to_end import BOS, bus, engine, published, story
from tests.engine.test_offload import metric, store_address

__all__ = ["bus", "published"]  # fixtures


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
    """Beside a choice that is drawn, as one rank draws it. What they computed of a prompt two other ranks find in the
    store, but not one alone. Ranks end with their engine."""
    drawn = pb.SamplingParams(temperature=1.0, top_p=0.9, seed=7, logprobs=2)
    prompt_ids = [BOS, *published[:100]]
    async with store_address() as address, answers(bus) as heard:
        settings: dict[str, Any] = {"kvstore": address, "metrics_address": "127.0.0.1:0", "tensor_parallel": 2}
        async with engine(bus, stories260k, **settings) as addresses:
            ranks = ranks_of()
            await publish(bus, story("a", [BOS], max_tokens=len(published)))
            await publish(bus, story("b", prompt_ids, max_tokens=40))
            await publish(bus, story("c", [BOS], max_tokens=20, sampling=drawn))
            await heard.finished("a", "b", "c")
            while await metric(addresses, "store_blocks_saved_total") < 12:  # those of the longest
                pass
        assert len(ranks) == 2
        await gone(ranks)
        async with engine(bus, stories260k, **settings):
            await publish(bus, story("again", prompt_ids, max_tokens=40))
            await heard.finished("again")
        async with engine(bus, stories260k, **settings | {"tensor_parallel": 1}):
            await publish(bus, story("alone", prompt_ids, max_tokens=40))
            await publish(bus, story("drawn alone", [BOS], max_tokens=20, sampling=drawn))
            await heard.finished("alone", "drawn alone")
        assert heard["a"].token_ids == published
        assert heard["c"].token_ids == heard["drawn alone"].token_ids
        for each, num_cached in (("b", 0), ("again", 96), ("alone", 0)):
            finish = heard[each].finish
            assert finish is not None and finish.usage.cached_tokens == num_cached
            assert heard[each].token_ids == published[100:140]


async def test_a_block_is_the_parts_of_its_ranks(stories260k: Path) -> None:
    """What was written is read again, and what a step computed moves to another block; steps may be launched ahead. Then a rank is killed while its
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
            ahead = [ranks.launch(each) for each in (decode, Step(3, (Work(0, 3, 1, True),)), step(4))]
            results = [ranks.collect(launched) for launched in ahead]
            assert [result.step.number for result in results] == [2, 3, 4]
            assert results[0].token_ids == results[2].token_ids == first.token_ids
            pids = ranks_of()
            os.kill(pids[1], signal.SIGSTOP)
            collecting = asyncio.create_task(asyncio.to_thread(ranks.collect, ranks.launch(step(5))))
            os.kill(pids[1], signal.SIGKILL)
            with pytest.raises(InternalError, match=rf"^rank 1 \(pid {pids[1]}\) was killed by SIGKILL$"):
                await asyncio.shield(collecting)
            await asyncio.Event().wait()
    await gone(pids)


async def test_an_error_in_a_rank_is_told_with_its_rank(stories260k: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In its own words, and in a line of its own log, under its number. The front alone shows a traceback, of the rank it
    names: others fail as that one does, and theirs explain nothing."""
    with pytest.RaisesGroup(InternalError, flatten_subgroups=True):
        async with group(stories260k) as ranks:
            pids = ranks_of()
            with (
                structlog.testing.capture_logs() as front,
                pytest.raises(InternalError, match=r"^rank [01] \(pid \d+\) failed: IndexError: .*out of bounds"),
            ):
                ranks.collect(ranks.launch(step(1, block=10_000)))
            await asyncio.Event().wait()
    await gone(pids)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"the rank failed"' in line]
    assert {line["rank"] for line in lines} & {0, 1}
    assert not any("Traceback" in str(line) for line in lines)
    (told,) = front
    assert told["event"] == "a rank is gone"
    assert told["exception"].startswith("Traceback")


async def test_a_stopped_rank_does_not_keep_its_engine(
    bus: MemoryBus, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that waits for it is given up, and it is killed with the others."""
    monkeypatch.setattr("services.engine.ranks.group.STOP_SECONDS", 0.2)
    waits, launch = asyncio.Event(), RankGroup.launch
    loop = asyncio.get_running_loop()

    def noted(self: RankGroup, step: Step) -> Step:
        launched = launch(self, step)
        loop.call_soon_threadsafe(waits.set)
        return launched

    monkeypatch.setattr(RankGroup, "launch", noted)
    async with asyncio.timeout(60):
        async with engine(bus, stories260k, tensor_parallel=2, drain_seconds=0):
            ranks = ranks_of()
            os.kill(ranks[1], signal.SIGSTOP)
            await publish(bus, story("a", [BOS], max_tokens=10))
            await waits.wait()
    assert all(thread.name != "holdfast-steps" for thread in threading.enumerate())
    await gone(ranks)


async def test_no_order_waits_for_a_stopped_rank_for_ever(stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the last one, where the rank left no room for it."""
    monkeypatch.setattr("services.engine.ranks.group.STOP_SECONDS", 0.2)
    is_full, wait = asyncio.Event(), RankGroup._wait
    loop = asyncio.get_running_loop()

    def noted(self: RankGroup, fd: int) -> None:
        loop.call_soon_threadsafe(is_full.set)
        wait(self, fd)

    monkeypatch.setattr(RankGroup, "_wait", noted)
    async with asyncio.timeout(60):
        async with group(stories260k) as ranks:
            pids = ranks_of()
            os.kill(pids[1], signal.SIGSTOP)
            content = bytes(2 * ranks.facts.layout.block_bytes)

            def fill() -> None:
                while True:
                    ranks.write_block(0, content)

            filling = asyncio.create_task(asyncio.to_thread(fill))
            await is_full.wait()
        with pytest.raises(InternalError, match=r"^the ranks did not answer within 0\.2 s of the engine's stop$"):
            await filling
    await gone(pids)


def test_a_rank_ends_with_its_front_before_it_imports_much() -> None:
    """What ties it comes first: torch takes seconds."""
    seen = "import sys, services.engine.ranks.child; print({'torch', 'pydantic', 'grpc'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout == "set()\n"


async def test_what_a_rank_refuses_the_front_refuses(bus: MemoryBus, stories260k: Path) -> None:
    """As the same error, once; the ranks are gone."""
    with pytest.raises(ConfigurationError, match="^max_model_len is 513, but the model's context has 512 tokens$"):
        async with engine(bus, stories260k, tensor_parallel=2, max_model_len=513):
            pass
    assert ranks_of() == []
