"""What an engine gains from a second copy of its model in fewer bits while more is asked of it than it can do.

    taskset -c 0 python -m benchmarks.economy --threads 1 --slots 4,16 --economy int4-g64

The time is the processor's: a step takes as long as this process had a processor for it, and while nothing is to be done the clock goes on to the
next request. So a machine that does other things too shows, but for its caches, what an engine with a core of its own does. First all is asked at
once, and what is answered is the capacity of the full copy. Then the same Poisson arrivals, at a multiple of that, meet an engine without the second
copy and one with it, turn by turn, each a new one. What has not come when a turn ends is given up; a first token that is still missing counts as if it
came then. The engine's scheduler, pace and steps, without threads and services.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.load import Request, poisson, token_ids
from benchmarks.options import above_zero, at_least, batches, engine_here, rules, run, setting
from benchmarks.report import Cell, Report, percentile
from holdfast import models
from services.engine.blocks import BlockPool
from services.engine.build import build
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import SamplingParams, Sequence, StopRules


@dataclass(frozen=True, slots=True)
class Turn:
    """What became of a load. Times are in seconds of a processor."""

    requests: Seq[Request]
    answers: Seq[Seq[float]]
    """When each token came, from when its request was due."""
    seconds: float
    """How long the load lasted."""
    economical: float
    """Share of all tokens that the second copy computed."""

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.answers)) / self.seconds

    def row(self) -> list[Cell]:
        """As `COLUMNS`."""
        both = list(zip(self.requests, self.answers, strict=True))
        whole = sum(len(times) == request.output_tokens for request, times in both)
        firsts = [times[0] if times else self.seconds - request.due for request, times in both]
        gaps = [late - early for times in self.answers for early, late in pairwise(times)]
        return [
            self.tokens_per_second,
            whole / self.seconds,
            percentile(firsts, 0.5),
            percentile(firsts, 0.99),
            1000 * percentile(gaps, 0.5),
            1000 * percentile(gaps, 0.99),
            100 * self.economical,
        ]


COLUMNS = (
    "tokens/s",
    "answers/s",
    "first token p50, s",
    "first token p99, s",
    "between tokens p50, ms",
    "between tokens p99, ms",
    "second copy, %",
)


def turn(folder: Path, given: Mapping[str, object], requests: Seq[Request], *, seconds: float, seed: int) -> Turn:
    """A new engine with these settings under a load, whose requests come in the order in which they are due. Raises
    ConfigurationError for settings that cannot be."""
    settings = engine_here(folder, {"device": "cpu", **given})
    computer = build(settings, folder)
    capacity = settings.capacity("cpu")
    limits = Limits(
        max_sequences=capacity.max_sequences,
        max_step_tokens=capacity.max_step_tokens,
        itl_target=settings.itl_target_ms / 1000,
        economy=settings.economy_targets(),
    )
    pool = BlockPool(computer.cache.num_blocks, block_size=capacity.block_size, keeps_prefixes=settings.prefix_cache)
    scheduler = Scheduler(pool, limits)
    draw = random.Random(seed)
    sequences = [
        _sequence(request, token_ids(request, vocab_size=computer.model.vocab_size, draw=draw)) for request in requests
    ]
    answers: dict[Sequence, list[float]] = {sequence: [] for sequence in sequences}
    coming, now = deque(sequences), 0.0
    while now < seconds:
        while coming and coming[0].arrival <= now:
            scheduler.add(coming.popleft())
        began = time.process_time()
        step = scheduler.plan(now)
        if step is None:
            now = coming[0].arrival if coming else seconds
            continue
        result = computer.runner.collect(computer.runner.launch(step))
        took = time.process_time() - began
        now += took
        scheduler.learn(step, took)
        for sequence in scheduler.commit(result, now):
            answers[sequence] += [now - sequence.arrival] * len(sequence.tell().token_ids)
    computer.runner.stop()
    totals = scheduler.totals
    return Turn(requests, list(answers.values()), now, totals.num_economical_tokens / totals.num_generated_tokens)


def _sequence(request: Request, prompt_ids: list[int]) -> Sequence:
    return Sequence(
        request_id="",
        choice=0,
        prompt_ids=prompt_ids,
        sampling=SamplingParams(temperature=0.0),
        stop=StopRules(max_tokens=request.output_tokens),
        arrival=request.due,
    )


def measure(options: argparse.Namespace) -> Report:
    folder = models.resolve(options.model, progress=print)
    report = Report("economy", settings={name: str(value) for name, value in vars(options).items() if name != "out"})
    for slots in options.slots:
        one = {"threads": options.threads, **dict(options.set), "max_sequences": slots}
        two = one | {"economy": options.economy, "economy_for": "all"}
        crowd = [Request(0.0, options.prompt, options.output)] * 1000
        full = turn(folder, one, crowd, seconds=options.capacity_seconds, seed=options.seed)
        rate = options.times * full.tokens_per_second / options.output
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
            for name, settings in (("one copy", one), ("two copies", two)):
                rows.append([name, *turn(folder, settings, requests, seconds=options.seconds, seed=seed).row()])
                print(rows[-1], flush=True)
        title = f"{slots} slots: {rate:.2f} requests/s, {options.times:g} times what one copy does"
        report.table(title, ["", *COLUMNS], rows)
    return report


def main(argv: Seq[str] | None = None) -> None:
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
        "--capacity-seconds", type=above_zero, default=10.0, help="that the capacity is measured (%(default)s)"
    )
    parser.add_argument("--turns", type=at_least(1), default=2, help="of each kind (%(default)s)")
    parser.add_argument("--prompt", type=at_least(1), default=64, help="tokens (%(default)s)")
    parser.add_argument("--output", type=at_least(2), default=64, help="tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    options = parser.parse_args(argv)
    run("economy", lambda: measure(options), out=options.out)


if __name__ == "__main__":
    main()
