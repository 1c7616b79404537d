"""An engine under random load with too few blocks, in small; and that its inspector sees what is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from benchmarks.offline import add_engine_options
from services.engine.batch import Admission, Growth, Step, Work
from services.engine.blocks import BlockPool
from services.engine.model_runner import Launched
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import SamplingParams, StopRules


def arguments(folder: Path, seconds: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    given = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--set",
        "block_size=16",
        "--set",
        "max_sequences=4",
        "--set",
        "cache_blocks=14",
    ]
    found = parser.parse_args([str(folder), *given])
    found.seconds, found.seed = seconds, 1
    return found


@pytest.mark.timeout(60)
async def test_a_crowded_engine_keeps_its_accounts(stories260k: Path) -> None:
    """Sequences are thrown out and cancelled, prefixes are found, everybody ends, and all adds up."""
    report = await soak.measure(arguments(stories260k, 2.0))
    load, memory = report.tables
    (row,) = load["rows"]  # type: ignore[misc]
    told = dict(zip(load["columns"], row, strict=True))  # type: ignore[call-overload]
    assert all(told[name] > 0 for name in ("requests", "cancelled", "tokens", "cached tokens", "preemptions"))
    assert [name for name, *_ in memory["rows"]] == ["host", "GPU"]  # type: ignore[attr-defined]


class Nothing:
    """A runner that computes nothing."""

    def launch(self, step: Step) -> Launched:
        return Launched(step, None, None)


def inspector() -> tuple[soak.Inspector, Scheduler]:
    scheduler = Scheduler(BlockPool(4, block_size=4), Limits(max_sequences=2, max_step_tokens=8))
    made = soak.Inspector(Nothing())  # type: ignore[arg-type]
    made.scheduler = scheduler
    return made, scheduler


def first_step(block: int, count: int = 3) -> Step:
    admission = Admission(0, [1] * count, num_prompt=count, choice=0, sampling=SamplingParams(), stop=StopRules(9))
    return Step(1, (Work(0, 0, count, True),), (admission,), (Growth(0, 0, (block,)),))


def test_a_block_that_is_nobody_s_is_noticed() -> None:
    """When a step writes it, and when it is given back too early."""
    made, scheduler = inspector()
    with pytest.raises(AssertionError, match="somebody else's or nobody's"):
        made.launch(first_step(2))
    made, scheduler = inspector()
    (block,) = scheduler.pool.allocate(1)
    launched = made.launch(first_step(block))
    scheduler.pool.release([block])
    with pytest.raises(AssertionError, match="freed while a step uses it"):
        made.collect(launched)


def test_a_block_too_few_is_noticed() -> None:
    """Five tokens do not fit into a block of four."""
    made, scheduler = inspector()
    (block,) = scheduler.pool.allocate(1)
    with pytest.raises(AssertionError, match="slot 0 lacks a block"):
        made.launch(first_step(block, 5))


def test_what_is_held_at_the_end_and_memory_that_grows_are_noticed() -> None:
    """By what it is, and by how much."""
    _, scheduler = inspector()
    memory = soak.Memory(torch.device("cpu"), host=[0] * 30, gpu=[0] * 30)
    soak.check(scheduler, memory, seconds=600)
    memory.gpu[20:] = [100 << 20] * 10
    with pytest.raises(AssertionError, match="grew by 100 MiB"):
        soak.check(scheduler, memory, seconds=600)
    scheduler.pool.allocate(1)
    with pytest.raises(AssertionError, match="'active blocks': 1"):
        soak.check(scheduler, memory, seconds=1)
