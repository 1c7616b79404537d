"""An engine with nothing around it, when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.offline import Workloads
from benchmarks.report import Report
from holdfast.errors import ConfigurationError, InternalError

SETTINGS = {"device": "cpu", "threads": 1, "max_sequences": 4}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Broken:
    """A runner that computes nothing."""

    def launch(self, step: object) -> NoReturn:
        raise RuntimeError("out of order")

    def collect(self, launched: object) -> NoReturn:
        raise AssertionError("nothing was launched")

    def stop(self) -> None:
        pass


async def answer(engine: EngineAlone) -> Any:
    return await engine.answers([[1, 2, 3]], [4])


async def test_who_waits_for_an_answer_hears_that_the_step_thread_failed(stories260k: Path) -> None:
    """And waits no longer: nothing would ever come."""
    with pytest.raises(ExceptionGroup) as raised:
        async with engine_alone(stories260k, SETTINGS, around=lambda runner: Broken()) as engine:
            await answer(engine)
    assert raised.group_contains(InternalError, match="out of order")


async def test_lengths_that_do_not_fit_are_refused(stories260k: Path) -> None:
    """Before anything is computed, and the engine goes on."""
    async with engine_alone(stories260k, SETTINGS) as engine:
        with pytest.raises(
            ConfigurationError, match=r"have 513 tokens here, and the engine takes 512: ask for shorter"
        ):
            await engine.answers([[1] * 3, [1] * 500], [4, 13])
        (tokens,) = await answer(engine)
        assert len(tokens) == 4


@pytest.mark.parametrize(("work", "tokens"), [("B", "1,153"), ("C", "2,049"), ("BC", "2,049")])
async def test_workloads_that_do_not_fit_are_refused(work: str, tokens: str, stories260k: Path) -> None:
    """By the longest of all that are asked for; shortened enough they fit."""
    async with engine_alone(stories260k, SETTINGS) as engine:
        full, short = (
            Workloads(engine, Report("offline", settings={}), vocab_size=engine.vocab_size, scale=scale)
            for scale in (1.0, 0.2)
        )
        with pytest.raises(ConfigurationError, match=f"have {tokens} tokens here"):
            full.require(work, count=3)
        short.require(work, count=3)
