"""An engine for a long time under random load, with too few blocks for it, its accounts checked at every step.

    python -m benchmarks.soak --seconds 600 --device cuda
    python -m benchmarks.soak FOLDER --seconds 60 --set max_sequences=8 --set cache_blocks=24

Clients ask, wait and ask again, three for each slot: random lengths, sampling parameters and pauses, prompts that often begin
alike, and one request in four cancelled somewhere on its way. The engine alone, without services. Ends with an error where blocks or slots
do not add up, a step uses a block that is nobody's, a request has no end, something is held when all have ended, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvloop

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.offline import add_engine_options, engine_settings
from benchmarks.options import above_zero, run
from benchmarks.report import Cell, Report
from holdfast import models
from holdfast.errors import ConfigurationError
from services.engine.batch import Step, StepResult
from services.engine.loop import Runner
from services.engine.model_runner import Launched
from services.engine.scheduler import Scheduler
from services.engine.sequence import FinishReason, SamplingParams, Sequence, StopRules

CLIENTS = 3
"""For each slot."""
CANCELLED = 0.25
SHARED = 0.5
"""Of the prompts begin like another."""
PROMPT_BLOCKS, OUTPUT_BLOCKS = 4, 8
"""Of a request, at most."""
BLOCKS = 2
"""For each slot, where no number is said: a third of what the sequences in them want."""
NO_END = 300.0
"""Seconds after which a request counts as one without an end."""
GROWTH = 48 << 20
"""Bytes that the last third of the time may have more than the second."""


class Inspector:
    """Stands between an engine and its runner, in the step thread, and keeps its own account of slots."""

    def __init__(self, runner: Runner[Launched]) -> None:
        self._runner = runner
        self._tables: dict[int, list[int]] = {}
        self._in_flight: dict[int, set[int]] = {}
        """By the step's number: the blocks of the slots that it computes for."""
        self.scheduler: Scheduler | None = None
        self.num_steps = 0

    def launch(self, step: Step) -> Launched:
        """As the runner does, if all adds up."""
        for slot in step.released:
            del self._tables[slot]
        for admission in step.admitted:
            assert admission.slot not in self._tables, f"slot {admission.slot} is admitted twice"
            self._tables[admission.slot] = []
        for growth in step.grown:
            table = self._tables[growth.slot]
            assert len(table) == growth.index, f"a hole in the block table of slot {growth.slot}"
            table.extend(growth.blocks)
        self._in_flight[step.number] = {block for work in step.works for block in self._tables[work.slot]}
        self._check(step)
        self.num_steps += 1
        return self._runner.launch(step)

    def collect(self, launched: Launched) -> StepResult:
        """As the runner does; until now nothing that the step uses was freed."""
        self._check_in_flight()
        del self._in_flight[launched.step.number]
        return self._runner.collect(launched)

    def stop(self) -> None:
        """As the runner does."""
        self._runner.stop()

    def _check(self, step: Step) -> None:
        scheduler = self.scheduler
        assert scheduler is not None
        pool, limits = scheduler.pool, scheduler.limits
        assert pool.num_free + pool.num_active + pool.num_cached == pool.num_blocks, "blocks do not add up"
        assert len(self._tables) <= limits.max_sequences, "more slots than there are"
        assert scheduler.num_running <= limits.max_sequences, "more sequences than slots"
        assert step.num_tokens <= limits.max_step_tokens, "a step of too many tokens"
        slots = [work.slot for work in step.works]
        assert len(slots) == len(set(slots)), "a slot is computed twice in a step"
        for work in step.works:
            assert work.end <= len(self._tables[work.slot]) * pool.block_size, f"slot {work.slot} lacks a block"
            for at in range(work.start // pool.block_size, (work.end - 1) // pool.block_size + 1):
                block = self._tables[work.slot][at]
                assert pool.num_references(block) == 1, f"block {block} is written, and somebody else's or nobody's"
        self._check_in_flight()

    def _check_in_flight(self) -> None:
        assert self.scheduler is not None
        pool = self.scheduler.pool
        for blocks in self._in_flight.values():
            assert all(pool.num_references(block) for block in blocks), "a block was freed while a step uses it"


@dataclass(slots=True)
class Memory:
    """What the process and its GPU hold, as time goes by."""

    device: torch.device
    host: list[int] = field(default_factory=list)
    gpu: list[int] = field(default_factory=list)

    def note(self) -> None:
        """Now."""
        self.host.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.gpu.append(torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0)

    def thirds(self, which: Seq[int]) -> list[float]:
        """The medians of the first, the second and the last third of the time."""
        third = max(1, len(which) // 3)
        return [statistics.median(part) for part in (which[:third], which[third : 2 * third] or which, which[-third:])]

    def growth(self) -> float:
        """Bytes that the last third has more than the second, host or GPU."""
        return max(last - middle for _, middle, last in (self.thirds(self.host), self.thirds(self.gpu)))


class Load:
    """Clients that ask until the time is over."""

    def __init__(self, engine: EngineAlone, *, seed: int) -> None:
        self._engine = engine
        self._draw = random.Random(seed)
        self._numbers = itertools.count()
        self._block = engine.scheduler.pool.block_size
        self._prompts: list[list[int]] = []
        self.ends: Counter[FinishReason] = Counter()

    async def run(self, seconds: float) -> Memory:
        """All clients; returns what memory did meanwhile. Raises ConfigurationError where the longest sequence does not fit."""
        pool, most = self._engine.scheduler.pool, PROMPT_BLOCKS + OUTPUT_BLOCKS
        if pool.num_blocks < most:
            raise ConfigurationError(
                f"the cache has {pool.num_blocks} blocks, and sequences of this load want up to {most}: ask for as many with cache_blocks"
            )
        end = time.monotonic() + seconds
        memory = Memory(self._engine.device)
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._engine.steps.watch())
            clients = [
                tasks.create_task(self._client(end))
                for _ in range(CLIENTS * self._engine.scheduler.limits.max_sequences)
            ]
            while not all(client.done() for client in clients):
                memory.note()
                await asyncio.wait(clients, timeout=min(1.0, seconds / 30))
            watch.cancel()
        return memory

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(self._draw.expovariate(20.0))
            sequence = self._sequence()
            cancel_after = self._draw.expovariate(1.0) if self._draw.random() < CANCELLED else None
            async with asyncio.timeout(NO_END):
                await self._engine.end_of(sequence, cancel_after=cancel_after)
            assert sequence.finish is not None
            assert sequence.finish is not FinishReason.ERROR, sequence.error
            self.ends[sequence.finish] += 1

    def _sequence(self) -> Sequence:
        draw = self._draw
        max_tokens = draw.randint(1, OUTPUT_BLOCKS * self._block)
        stops = frozenset(draw.sample(range(self._engine.vocab_size), 3)) if draw.random() < 0.2 else frozenset()
        return Sequence(
            request_id=str(next(self._numbers)),
            choice=0,
            prompt_ids=self._prompt(draw.randint(1, PROMPT_BLOCKS * self._block)),
            sampling=self._sampling(),
            stop=StopRules(max_tokens, min_tokens=min(max_tokens, draw.randint(0, 3)), stop_token_ids=stops),
            interactive=draw.random() < 0.8,
            arrival=time.time(),
        )

    def _prompt(self, length: int) -> list[int]:
        """Of this length; often it begins as one of the last ones did."""
        draw, begin = self._draw, list[int]()
        if self._prompts and draw.random() < SHARED:
            begin = draw.choice(self._prompts)[: draw.randint(0, length)]
        prompt_ids = begin + [draw.randrange(self._engine.vocab_size) for _ in range(length - len(begin))]
        self._prompts = [*self._prompts[-15:], prompt_ids]
        return prompt_ids

    def _sampling(self) -> SamplingParams:
        draw = self._draw
        if draw.random() < 0.5:
            return SamplingParams(temperature=0.0, logprobs=draw.choice([None, None, 0, 5]))
        return SamplingParams(
            temperature=draw.choice([0.7, 1.0]),
            top_k=draw.choice([0, 0, 20]),
            top_p=draw.choice([1.0, 1.0, 0.9]),
            min_p=draw.choice([0.0, 0.0, 0.05]),
            presence_penalty=draw.choice([0.0, 0.0, 0.5]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.1]),
            logit_bias=draw.choice([(), (), ((1, 2.0),)]),
            seed=draw.getrandbits(64),
            logprobs=draw.choice([None, None, 3]),
        )


async def measure(arguments: argparse.Namespace) -> Report:
    """Raises an exception where something does not add up."""
    folder = models.resolve(arguments.model, weights=arguments.load_format != "dummy")
    settings = engine_settings(arguments, most=16) | {"prefix_cache": True, "max_sequences": 16} | dict(arguments.set)
    slots = settings["max_sequences"]
    assert isinstance(slots, int)
    settings.setdefault("cache_blocks", max(PROMPT_BLOCKS + OUTPUT_BLOCKS + 2, BLOCKS * slots))
    settings["max_model_len"] = None
    report = Report("soak", settings={**settings, "seconds": arguments.seconds, "model": folder.name})
    inspectors: list[Inspector] = []

    def inspected(runner: Runner[Launched]) -> Runner[Launched]:
        inspectors.append(Inspector(runner))
        return inspectors[0]

    async with engine_alone(folder, settings, around=inspected) as engine:
        inspectors[0].scheduler = engine.scheduler
        load = Load(engine, seed=arguments.seed)
        start = time.monotonic()
        memory = await load.run(arguments.seconds)
        _report(report, engine, load, inspectors[0], memory, seconds=time.monotonic() - start)
        check(engine.scheduler, memory, seconds=arguments.seconds)
    return report


def check(scheduler: Scheduler, memory: Memory, *, seconds: float) -> None:
    """Now that all requests have ended. Of a time too short for its thirds to be alike, growth means nothing."""
    pool = scheduler.pool
    held = {"sequences": scheduler.num_held, "active blocks": pool.num_active}
    assert not any(held.values()), f"all requests have ended, and still there are {held}"
    assert pool.num_free + pool.num_cached == pool.num_blocks, "blocks are lost"
    if seconds >= 60:
        assert memory.growth() <= GROWTH, f"memory grew by {memory.growth() / 2**20:.0f} MiB"


def _report(
    report: Report, engine: EngineAlone, load: Load, inspector: Inspector, memory: Memory, *, seconds: float
) -> None:
    totals, ends = engine.scheduler.totals, load.ends
    report.table(
        "Load",
        ["s", "requests", "cancelled", "steps", "tokens", "prefill tokens", "cached tokens", "preemptions"],
        [
            [
                f"{seconds:.1f}",
                ends.total(),
                ends[FinishReason.CANCELLED],
                inspector.num_steps,
                totals.num_generated_tokens,
                totals.num_prefill_tokens,
                totals.num_cached_tokens,
                totals.num_preemptions,
            ]
        ],
    )
    rows: list[list[Cell]] = [
        [name, *(at / 2**20 for at in memory.thirds(which))]
        for name, which in (("host", memory.host), ("GPU", memory.gpu))
    ]
    report.table("Memory, MiB, median of each third of the time", ["", "start", "middle", "end"], rows)


def main() -> None:
    """`python -m benchmarks.soak`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--seconds", type=above_zero, default=600.0, help="for how long requests begin")
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args()
    run("soak", lambda: uvloop.run(measure(arguments)), out=arguments.out)


if __name__ == "__main__":
    main()
