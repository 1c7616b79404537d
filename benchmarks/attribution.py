"""Where the time of a decode step goes.

    python -m benchmarks.attribution FOLDER_WITH_A_CONFIG --load-format dummy --device cuda --batches 1,32,128,256

Each batch decodes twice: once untouched, for the time of a step and what the host does of it, and once under torch's
profiler, for what the device does. The profiler slows steps down, so its parts are beside the step's time, not within it.
Both are of steps that decode the whole batch: not of those before all prompts are computed, or after the first answer ended.

Every instant of the device belongs to the operation that began first of those that have not ended: a kernel that is set up
while the one before ends (programmatic dependent launch) does not count while it waits. What belongs to none is a gap.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvloop
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.offline import add_engine_options, engine_settings, prompts_of
from benchmarks.options import at_least, batches, run
from benchmarks.report import Cell, Report
from holdfast import models
from holdfast.errors import ConfigurationError
from services.engine.batch import Step, StepResult
from services.engine.loop import Runner
from services.engine.model_runner import Launched

T = TypeVar("T")

PARTS = {
    "attention": r"attend|number_items|_list_|_widen_pages|attention|flash",
    "experts": r"expert|moe|grouped",
    "products": r"gemv|matmul|gemm|nvjet|cutlass|splitk|cublas|linear|mm\b",
    "sampling": r"_best|_choose|_weigh_groups|_floor|_keep|_edit|_report|argmax|softmax|topk|exponential",
    "copies": r"memcpy|memset|copy|gather|index",
}
"""What the name of an operation says of it, the first that fits. All others are norms, rotations, gates and the like."""
REST = "other"

FEWEST_STEPS = 6
"""Of the whole batch, for a mean: two at either end are left out."""

DECODE = "holdfast::decode"
"""What the trace of a CPU has where a decode step is launched."""
BEGIN = re.compile(rf"_lay_out$|{DECODE}")
"""The first operation of each decode step, on a GPU and on a CPU."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What the device did for a while. Microseconds."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Attribution:
    """Microseconds of so many steps."""

    steps: int = 0
    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    names: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The same by the name of the operation."""
    gaps: float = 0.0

    def longest(self, count: int) -> list[tuple[str, float]]:
        """The operations that took most, and what each took."""
        return sorted(self.names.items(), key=lambda item: -item[1])[:count]


def attribute(operations: Iterable[Operation], launches: Sequence[int], *, batch: int) -> Attribution:
    """Gives each instant of the steps that decode `batch` sequences to one operation, or to the gaps. Such a step lasts from
    its beginning to that of the next, which must be a decode too. `launches`: of every step that was launched meanwhile how
    many sequences it decoded, 0 where it did anything else.

    Raises:
        ConfigurationError: there are too few such steps.
        ValueError: the trace has more or fewer decode steps than were launched.
    """
    ordered = sorted(operations, key=lambda operation: (operation.start, -operation.end))
    begins = [index for index, operation in enumerate(ordered) if BEGIN.search(operation.name)]
    decodes = [number for number, size in enumerate(launches) if size]
    if len(begins) != len(decodes):
        raise ValueError(
            f"the trace has {len(begins)} decode steps, and {len(decodes)} were launched; on a GPU, only captured ones are known as such"
        )
    steps = [
        range(*span)
        for span, (number, following) in zip(pairwise(begins), pairwise(decodes), strict=True)
        if launches[number] == batch and following == number + 1
    ]
    gaps, owned = _shares(ordered)
    found = Attribution()
    for step in settled(steps):
        found.steps += 1
        for index in step:
            name = ordered[index].name
            found.parts[part_of(name)] += owned[index]
            found.names[name] += owned[index]
            found.gaps += gaps[index + 1]
    return found


def _shares(ordered: Sequence[Operation]) -> tuple[list[float], list[float]]:
    """Of each operation, in the order of their beginnings, the gap before it and the time that is its own."""
    ends = [-math.inf, *accumulate((each.end for each in ordered), max)]
    gaps = [max(0.0, each.start - now) for each, now in zip(ordered, ends, strict=False)]
    owned = [max(0.0, each.end - max(each.start, now)) for each, now in zip(ordered, ends, strict=False)]
    return gaps, owned


def part_of(name: str) -> str:
    """The part that an operation of this name belongs to."""
    return next((part for part, words in PARTS.items() if re.search(words, name, re.IGNORECASE)), REST)


def operations_of(trace: Mapping[str, Any], *, on_gpu: bool) -> list[Operation]:
    """Those of a trace as torch's profiler exports it: what a GPU ran, or what the step thread of a CPU called."""
    events = [event for event in trace["traceEvents"] if "dur" in event]
    if on_gpu:
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        return [_operation(event, event["dur"]) for event in events if event.get("cat") in kinds]
    marks = [event for event in events if event["name"] == DECODE and event.get("cat") == "user_annotation"]
    threads = {event["tid"] for event in marks}
    calls = [event for event in events if event.get("cat") == "cpu_op" and event["tid"] in threads]
    # A mark holds the operations of its step; it is there to be counted.
    return [_operation(event, event["dur"]) for event in calls] + [_operation(event, 0) for event in marks]


def _operation(event: Mapping[str, Any], duration: float) -> Operation:
    return Operation(event["name"], event["ts"], event["ts"] + duration)


@dataclass(frozen=True, slots=True)
class Times:
    """When the step thread came to the doors of the runner with one step. Seconds."""

    launch: float
    launched: float
    collect: float = 0.0
    collected: float = 0.0


class TimedRunner:
    """A runner whose decode steps are timed."""

    def __init__(self, runner: Runner[Launched]) -> None:
        self._runner = runner
        self._launched: dict[int, Times] = {}
        self.decodes: dict[int, list[Times]] = {}
        """By how many sequences they had."""
        self.launches: list[int] = []
        """Of every step how many sequences it decoded; 0 where it did anything else."""

    def forget(self) -> None:
        """What was until now."""
        self.decodes.clear()
        self.launches.clear()

    def launch(self, step: Step) -> Launched:
        """As the runner's."""
        start = time.perf_counter()
        self.launches.append(len(step.works) if step.is_decode else 0)
        if not step.is_decode:
            return self._runner.launch(step)
        with torch.profiler.record_function(DECODE):
            launched = self._runner.launch(step)
        self._launched[step.number] = Times(start, time.perf_counter())
        return launched

    def collect(self, launched: Launched) -> StepResult:
        """As the runner's."""
        start = time.perf_counter()
        result = self._runner.collect(launched)
        if times := self._launched.pop(launched.step.number, None):
            done = Times(times.launch, times.launched, start, time.perf_counter())
            self.decodes.setdefault(len(launched.step.works), []).append(done)
        return result

    def stop(self) -> None:
        """As the runner's."""
        self._runner.stop()


def settled(steps: Sequence[T]) -> Sequence[T]:
    """Steps of the whole batch without the first two, for which the device had to begin, and the last two. Raises
    ConfigurationError where too few are left."""
    if len(steps) < FEWEST_STEPS:
        raise ConfigurationError(
            f"only {len(steps)} steps decoded the whole batch, and it takes {FEWEST_STEPS} to say anything: raise --output, "
            "or lower --context"
        )
    return steps[2:-2]


def host_share(decodes: Sequence[Times]) -> tuple[float, float, float]:
    """Mean milliseconds of a step, of its launch, and of waiting for the device: what is left, the host schedules and
    takes in. Raises ConfigurationError where there are too few steps."""
    steps = settled(decodes)
    span = steps[-1].collected - steps[0].collected
    launching = sum(step.launched - step.launch for step in steps[1:])
    waiting = sum(step.collected - step.collect for step in steps[1:])
    return tuple(seconds / (len(steps) - 1) * 1e3 for seconds in (span, launching, waiting))  # type: ignore[return-value]


async def profiled(engine: EngineAlone, runner: TimedRunner, prompts: list[list[int]], output: int) -> Attribution:
    """What the device does while these are answered. Raises ConfigurationError where they decode too few steps together."""
    on_gpu = engine.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    runner.forget()
    with torch.profiler.profile(activities=[activity], experimental_config=every_thread, acc_events=True) as profiler:
        await engine.answers(prompts, [output] * len(prompts))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        operations = operations_of(json.loads(path.read_text()), on_gpu=on_gpu)
    return attribute(operations, runner.launches, batch=len(prompts))


async def measure(arguments: argparse.Namespace) -> Report:
    """Runs the batches that were asked for."""
    folder = models.resolve(arguments.model, weights=arguments.load_format != "dummy")
    settings = engine_settings(arguments, most=max(arguments.batches))
    report = Report("attribution", settings={**settings, **vars(arguments), "out": None, "model": folder.name})
    rows: list[list[Cell]] = []
    kernels: list[list[Cell]] = []
    async with engine_alone(folder, settings, around=TimedRunner) as engine:
        runner = engine.runner
        assert isinstance(runner, TimedRunner)
        engine.require(arguments.context + max(8, arguments.output))
        for batch in arguments.batches:
            prompts = prompts_of([arguments.context] * batch, vocab_size=engine.vocab_size)
            await engine.answers(prompts, [8] * batch)
            runner.forget()
            await engine.answers(prompts, [arguments.output] * batch)
            step, launch, waiting = host_share(runner.decodes.get(batch, []))
            found = await profiled(engine, runner, prompts, arguments.output)
            parts = [found.parts[part] / found.steps / 1e3 for part in (*PARTS, REST)]
            rows.append([str(batch), step, *parts, found.gaps / found.steps / 1e3, launch, step - launch - waiting])
            kernels += [[name[:80], batch, microseconds / found.steps] for name, microseconds in found.longest(12)]
    columns = ["batch", "step", *PARTS, REST, "gaps", "host: launch", "host: schedule, take in"]
    report.table(f"A decode step, ms ({arguments.context} tokens of context)", columns, rows)
    report.table("Longest operations, microseconds a step", ["operation", "batch", "µs"], kernels)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.attribution`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--batches", type=batches, default="1,32,128,256", help="how many sequences decode together")
    parser.add_argument("--context", type=at_least(1), default=1024, help="tokens of each prompt")
    parser.add_argument("--output", type=at_least(FEWEST_STEPS + 2), default=64, help="tokens of each answer")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args(argv)
    run("attribution", lambda: uvloop.run(measure(arguments)), out=arguments.out)


if __name__ == "__main__":
    main()
