"""What an engine gains from a second copy of its model in fewer bits while more is asked of it than it can do.

    taskset -c 0 python -m benchmarks.economy --threads 1 --slots 4,16 --economy int4-g64

First clients that ask one thing after the other, as many as there are slots, tell the capacity of the full copy. Then the same Poisson
arrivals, at a multiple of that, meet an engine without the second copy and one with it, turn by turn, each a new one: what else the
machine does shows in how far the turns of one kind differ, and in how much of a processor they had. What has not come when the load ends is given up;
a first token that is still missing counts as if it came then. The engine alone, without services.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import uvloop

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.load import Request, poisson, token_ids
from benchmarks.options import above_zero, at_least, batches, rules, run, setting
from benchmarks.report import Cell, Report, percentile
from holdfast import models

WARM = 0.25
"""Of the time in which the capacity is measured, at its beginning, is not counted."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What became of a load. Times are in seconds."""

    requests: Sequence[Request]
    answers: Sequence[Sequence[float]]
    """When each token came, from when its request was due."""
    seconds: float
    """How long the load lasted."""
    processor: float
    """Time that the process had of a processor."""
    economical: float
    """Share of all tokens that the second copy computed."""

    def row(self) -> list[Cell]:
        """As `COLUMNS`."""
        tokens = sum(map(len, self.answers))
        both = list(zip(self.requests, self.answers, strict=True))
        whole = sum(len(times) == request.output_tokens for request, times in both)
        firsts = [times[0] if times else self.seconds - request.due for request, times in both]
        gaps = [late - early for times in self.answers for early, late in pairwise(times)]
        return [
            tokens / self.seconds,
            tokens / self.processor,
            100 * self.processor / self.seconds,
            whole / self.seconds,
            percentile(firsts, 0.5),
            percentile(firsts, 0.99),
            1000 * percentile(gaps, 0.5),
            1000 * percentile(gaps, 0.99),
            100 * self.economical,
        ]


COLUMNS = (
    "tokens/s",
    "tokens/processor s",
    "processor, %",
    "answers/s",
    "first token p50, s",
    "first token p99, s",
    "between tokens p50, ms",
    "between tokens p99, ms",
    "second copy, %",
)


async def capacity(engine: EngineAlone, options: argparse.Namespace) -> float:
    """Answers a second of clients that ask one thing after the other."""
    draw = random.Random(options.seed)
    begin = time.perf_counter() + WARM * options.capacity_seconds
    end = begin + (1 - WARM) * options.capacity_seconds
    came: list[float] = []

    async def client() -> None:
        while time.perf_counter() < end:
            request = Request(0.0, options.prompt, options.output)
            came.extend(await engine.token_times(prompt_of(engine, request, draw), options.output))

    async with asyncio.TaskGroup() as group:
        for _ in range(engine.scheduler.limits.max_sequences):
            group.create_task(client())
    return sum(begin <= at <= end for at in came) / float(options.output * (end - begin))


def prompt_of(engine: EngineAlone, request: Request, draw: random.Random) -> list[int]:
    return token_ids(request, vocab_size=engine.vocab_size, draw=draw)


async def turn(engine: EngineAlone, requests: Sequence[Request], *, seconds: float, seed: int) -> Turn:
    """Sends every request when it is due, and counts what came within so many seconds."""
    draw = random.Random(seed)
    for _ in range(2):
        await engine.token_times(prompt_of(engine, requests[0], draw), 16)
    prompts = [prompt_of(engine, request, draw) for request in requests]
    start, used = time.perf_counter(), time.process_time()

    async def send(request: Request, prompt: list[int]) -> list[float]:
        due = start + request.due
        await asyncio.sleep(due - time.perf_counter())
        left = start + seconds - time.perf_counter()
        times = await engine.token_times(prompt, request.output_tokens, within=left)
        return [at - due for at in times]

    answers = await asyncio.gather(*map(send, requests, prompts))
    used = time.process_time() - used
    totals = engine.scheduler.totals  # its thread has nothing to do any more
    share = totals.num_economical_tokens / totals.num_generated_tokens
    return Turn(requests, answers, seconds, used, share)


async def measure(options: argparse.Namespace) -> Report:
    folder = models.resolve(options.model, progress=print)
    report = Report("economy", settings={name: str(value) for name, value in vars(options).items() if name != "out"})
    for slots in options.slots:
        plain = {"device": "cpu", "threads": options.threads, **dict(options.set), "max_sequences": slots}
        async with engine_alone(folder, plain) as engine:
            answers = await capacity(engine, options)
        rate = options.times * answers
        rows: list[list[Cell]] = []
        for seed in range(options.seed, options.seed + options.turns):
            arrivals = poisson(
                max(1, round(2 * rate * options.seconds)),
                rate=rate,
                prompt_tokens=options.prompt,
                output_tokens=options.output,
                seed=seed,
            )
            requests = [request for request in arrivals if request.due < options.seconds] or arrivals[:1]
            for name, more in (("one copy", {}), ("two copies", {"economy": options.economy, "economy_for": "all"})):
                async with engine_alone(folder, plain | more) as engine:
                    found = await turn(engine, requests, seconds=options.seconds, seed=seed)
                rows.append([name, *found.row()])
                print(rows[-1], flush=True)
        title = f"{slots} slots: {rate:.2f} requests/s, {options.times:g} times what one copy does"
        report.table(title, ["", *COLUMNS], rows)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.economy`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a known name")
    parser.add_argument("--threads", type=at_least(1), help="by default one for each core")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of both engines"
    )
    parser.add_argument("--slots", type=batches, default="4,16", help="most sequences in a step (%(default)s)")
    parser.add_argument("--economy", type=rules, default="int4-g64", help="formats of the second copy (%(default)s)")
    parser.add_argument("--times", type=above_zero, default=1.5, help="of the capacity, that is offered (%(default)s)")
    parser.add_argument("--seconds", type=above_zero, default=60.0, help="of a turn's load (%(default)s)")
    parser.add_argument(
        "--capacity-seconds", type=above_zero, default=20.0, help="that the capacity is measured (%(default)s)"
    )
    parser.add_argument("--turns", type=at_least(1), default=2, help="of each kind (%(default)s)")
    parser.add_argument("--prompt", type=at_least(1), default=64, help="tokens (%(default)s)")
    parser.add_argument("--output", type=at_least(2), default=64, help="tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    options = parser.parse_args(argv)
    run("economy", lambda: uvloop.run(measure(options)), out=options.out)


if __name__ == "__main__":
    main()
