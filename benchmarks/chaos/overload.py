"""More requests than a mesh can answer: what it refuses, how, what it still answers, and how soon it is well again.

    python -m benchmarks.chaos.overload --model smollm2-135m-instruct --engines 1 --seconds 60

First as many clients as the engines have slots ask one thing after the other: what they get is the capacity. Then requests
come at a multiple of that, at random, whether or not anything is answered, and nobody who is refused comes again. At the end
single requests tell when the mesh is as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.chaos import fleet
from benchmarks.chaos.clients import Clients, Stream, Task, Text, tasks, undisturbed
from benchmarks.chaos.command import Findings, add_options, folder_of, report_of, run
from benchmarks.options import above_zero, at_least
from benchmarks.report import Report, percentile
from holdfast import models

WARM = 0.25
"""Of the time in which the capacity is measured, at its beginning, is not counted."""

WELL = 2.0
"""The mesh is well again when a first token takes no longer than this many times what it took before."""

LEAST = 0.9
"""Of the capacity, that is to be answered under overload."""

PATIENCE = 300.0
"""Seconds after which it is not expected to be."""


@dataclass(slots=True)
class Overload:
    """What the mesh did. Times are in seconds, of `time.monotonic` where they are moments."""

    alone: float
    """To the first token of one request alone."""
    capacity: float
    """Answers a second."""
    offered: float
    """Requests a second."""
    begin: float
    end: float
    streams: Sequence[Stream]
    recovered_after: float
    """From the end of the load to a first token as soon as ever."""

    @property
    def goodput(self) -> float:
        """Whole answers a second, while the load lasted."""
        held = [stream for stream in self.streams if stream.has_held and stream.ended <= self.end]
        return len(held) / (self.end - self.begin)


async def overload(addresses: Sequence[str], expected: Mapping[Task, Text], options: argparse.Namespace) -> Overload:
    """Measures a mesh that runs."""
    alone = [await _first_token(addresses, expected, seed=seed) for seed in range(5)]
    capacity = await _capacity(addresses, expected, options)
    crowd = Clients(addresses, expected, seed=options.seed, leaves=0.0)
    draw = random.Random(options.seed)
    begin = time.monotonic()
    end = begin + options.seconds
    async with asyncio.TaskGroup() as group:
        while time.monotonic() < end:
            group.create_task(crowd.ask())
            await asyncio.sleep(draw.expovariate(options.times * capacity))
        recovering = group.create_task(_recovery(addresses, expected, percentile(alone, 0.5)))
    return Overload(
        percentile(alone, 0.5), capacity, options.times * capacity, begin, end, crowd.streams, recovering.result()
    )


async def _capacity(addresses: Sequence[str], expected: Mapping[Task, Text], options: argparse.Namespace) -> float:
    clients = Clients(addresses, expected, seed=options.seed, leaves=0.0)
    running = asyncio.create_task(clients.run(options.clients, pause=0.0))
    await asyncio.sleep(WARM * options.seconds)
    begin = time.monotonic()
    await asyncio.sleep((1 - WARM) * options.seconds)
    end = time.monotonic()
    clients.stop()
    await running
    return sum(begin <= stream.ended <= end and stream.has_held for stream in clients.streams) / (end - begin)


async def _first_token(addresses: Sequence[str], expected: Mapping[Task, Text], *, seed: int) -> float:
    """Seconds to the first token of one request; for ever where it is refused."""
    client = Clients(addresses, expected, seed=seed, leaves=0.0)
    await client.ask()
    (stream,) = client.streams
    return stream.first_token - stream.asked if stream.has_held else float("inf")


async def _recovery(addresses: Sequence[str], expected: Mapping[Task, Text], alone: float) -> float:
    """Seconds until a first token comes as soon as it did before the load."""
    begin = time.monotonic()
    for seed in range(1 << 30):
        asked = time.monotonic()
        if asked - begin > PATIENCE:
            break
        if await _first_token(addresses, expected, seed=seed) <= WELL * alone:
            return asked - begin
        await asyncio.sleep(0.25)
    return float("inf")


def describe(report: Report, found: Overload) -> None:
    """Adds the tables to the report."""
    accepted = [stream for stream in found.streams if stream.accepted]
    refused = [stream for stream in found.streams if stream.refusal]
    waits = [stream.retry_after for stream in refused]
    firsts = [stream.first_token - stream.asked for stream in accepted if stream.first_token]
    report.table(
        "Overload",
        ["", "value"],
        [
            ["capacity, answers a second", found.capacity],
            ["offered, requests a second", found.offered],
            ["requests", len(found.streams)],
            ["accepted", len(accepted)],
            ["with the whole text, every token once", sum(stream.has_held for stream in accepted)],
            ["with a failure", sum(bool(stream.failure) for stream in accepted)],
            ["goodput, whole answers a second while the load lasted", found.goodput],
            ["goodput / capacity, %", 100 * found.goodput / found.capacity],
            ["refused", len(refused)],
            ["refused without a time to come back", sum(wait <= 0 for wait in waits)],
            ["time to come back, s: least", min(waits, default=None)],
            ["time to come back, s: p50", percentile(waits, 0.5) if waits else None],
            ["time to come back, s: most", max(waits, default=None)],
            ["time to a refusal, ms: p99", 1000 * percentile([s.ended - s.asked for s in refused], 0.99)],
            ["first token of one request alone, s", found.alone],
            ["first token of those accepted, s: p50", percentile(firsts, 0.5)],
            ["first token of those accepted, s: p99", percentile(firsts, 0.99)],
            ["well again after the load, s", found.recovered_after],
        ],
    )
    said = Counter(stream.refusal.partition(":")[0] for stream in refused)
    report.table("Refusals", ["", "requests"], [[kind, count] for kind, count in said.most_common()])


async def measure(options: argparse.Namespace) -> Findings:
    report = report_of("chaos.overload", options)
    shape = fleet.Shape(1, 1, options.engines, options.gateways)
    engine = [*fleet.ENGINE_FLAGS, *options.engine_flags]
    model, folder = models.resolve(options.model), folder_of(options)
    async with fleet.running(model, shape, engine=engine, gateway=options.gateway_flags, folder=folder) as mesh:
        expected = await undisturbed(mesh.addresses[0], tasks(options.lengths))
        found = await overload(mesh.addresses, expected, options)
    describe(report, found)
    broken = [stream.failure for stream in found.streams if stream.failure]
    broken += ["a refusal does not say when to come back" for s in found.streams if s.refusal and s.retry_after <= 0]
    if found.goodput < LEAST * found.capacity:
        broken.append(f"{found.goodput:.2f} answers a second, and {found.capacity:.2f} are what the mesh can do")
    if found.recovered_after > PATIENCE:
        broken.append(f"it was not well again after {PATIENCE:g} s")
    return report, broken


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos.overload", description=(__doc__ or "").partition("\n")[0]
    )
    add_options(parser, lengths=[32])
    parser.add_argument(
        "--seconds", type=above_zero, default=60.0, help="of the load, and of the capacity (%(default)s)"
    )
    parser.add_argument("--times", type=above_zero, default=3.0, help="the capacity that is offered (%(default)s)")
    parser.add_argument("--clients", type=at_least(1), default=64, help="that find out the capacity (%(default)s)")
    parser.add_argument("--engines", type=at_least(1), default=1, help="how many (%(default)s)")
    parser.add_argument("--gateways", type=at_least(1), default=1, help="how many (%(default)s)")
    parser.add_argument("--gateway-flags", nargs="*", default=[], help="further flags of the gateways")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("overload", measure, arguments())
