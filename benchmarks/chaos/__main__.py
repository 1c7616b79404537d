"""`python -m benchmarks.chaos`: faults, one after the other, while clients stream; ends with an error where something did not hold."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence

from benchmarks.chaos import faults, findings, fleet
from benchmarks.chaos.clients import Clients, tasks, undisturbed, variants
from benchmarks.chaos.command import Findings, add_options, folder_of, report_of, run
from benchmarks.chaos.faults import Fault
from benchmarks.options import above_zero, at_least
from holdfast import models

SETTLE = 120.0
"""Seconds that the last streams may take."""


async def measure(options: argparse.Namespace) -> Findings:
    report = report_of("chaos", options)
    chosen = faults.plan(options.faults, options.only, seed=options.seed)
    shape = fleet.Shape(options.brokers, options.tokenizers, options.engines, options.gateways)
    flags = [*fleet.ENGINE_FLAGS, *options.engine_flags]
    model, folder = models.resolve(options.model), folder_of(options)
    async with fleet.running(model, shape, engine=flags, folder=folder) as mesh:
        plain = await undisturbed(mesh.addresses[0], tasks(options.lengths))
        expected = plain | await undisturbed(mesh.addresses[0], variants(plain))
        clients = Clients(mesh.addresses, expected, seed=options.seed)
        streaming = asyncio.create_task(clients.run(options.clients, pause=options.pause))
        happened = await break_things(mesh, chosen, options)
        clients.stop()
        try:
            await asyncio.wait_for(streaming, SETTLE)
        except TimeoutError:
            print("some streams did not come to their end")
        exits = {part.name: part.exits for part in mesh.parts if part.exits}
    findings.describe(report, clients.streams, happened, exits)
    return report, findings.broken(clients.streams, happened, exits, takeover=options.takeover)


async def break_things(mesh: fleet.Fleet, chosen: Sequence[faults.Kind], options: argparse.Namespace) -> list[Fault]:
    """One fault after the other, each mended before the next."""
    draw = random.Random(options.seed)
    happened = []
    for number, kind in enumerate(chosen, start=1):
        await asyncio.sleep(draw.uniform(0.5, 1.0) * options.gap)
        fault = await faults.inject(kind, mesh, draw)
        happened.append(fault)
        print(f"{number:4} {fault.kind.name}: {fault.what}, mended after {fault.mended - fault.at:.1f} s", flush=True)
    await asyncio.sleep(options.gap + faults.SESSION)
    return happened


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").partition("\n")[0])
    add_options(parser, lengths=[64, 160, 320])
    parser.add_argument(
        "--faults", type=at_least(1), default=len(faults.KINDS), help="how many (%(default)s: one of each kind)"
    )
    parser.add_argument("--only", nargs="+", default=[], help="kinds of faults; by default all")
    parser.add_argument("--gap", type=above_zero, default=2.0, help="seconds between two, at most (%(default)s)")
    parser.add_argument("--clients", type=at_least(1), default=32, help="how many stream at once (%(default)s)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two streams of one (%(default)s)")
    parser.add_argument("--takeover", type=above_zero, help="seconds that a takeover may take (p99); more is an error")
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1, help="how many (%(default)s)")
    parser.add_argument("--tokenizers", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--engines", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--gateways", type=int, default=2, help="how many (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("chaos", measure, arguments())
