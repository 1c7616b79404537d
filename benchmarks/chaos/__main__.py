"""`python -m benchmarks.chaos`: faults, one after the other, while clients stream; ends with an error where something did not hold."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.chaos import faults, findings, fleet
from benchmarks.chaos.clients import Clients, tasks, undisturbed
from benchmarks.chaos.faults import Fault
from benchmarks.mesh import MeshError
from benchmarks.options import above_zero, at_least
from benchmarks.report import Report
from holdfast import models
from holdfast.errors import HoldfastError

SETTLE = 120.0
"""Seconds that the last streams may take."""


async def measure(options: argparse.Namespace) -> tuple[Report, list[str]]:
    """The report, and what did not hold."""
    report = Report("chaos", settings={key: str(value) for key, value in vars(options).items() if key != "out"})
    chosen = faults.plan(options.faults, options.only, seed=options.seed)
    shape = fleet.Shape(options.brokers, options.tokenizers, options.engines, options.gateways)
    flags = [*fleet.ENGINE_FLAGS, *options.engine_flags]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="holdfast-chaos-"))
    print(f"logs and records: {folder}")
    async with fleet.running(models.resolve(options.model), shape, engine=flags, folder=folder) as mesh:
        expected = await undisturbed(mesh.addresses[0], tasks(options.lengths))
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
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a folder, or the name of a model (%(default)s)"
    )
    parser.add_argument("--faults", type=int, default=9, help="how many (%(default)s: one of each kind)")
    parser.add_argument("--only", nargs="+", default=[], help="kinds of faults; by default all")
    parser.add_argument("--gap", type=above_zero, default=2.0, help="seconds between two, at most (%(default)s)")
    parser.add_argument("--clients", type=at_least(1), default=32, help="how many stream at once (%(default)s)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two streams of one (%(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 160, 320], help="tokens of an answer (%(default)s)"
    )
    parser.add_argument("--takeover", type=above_zero, help="seconds that a takeover may take (p99); more is an error")
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1, help="how many (%(default)s)")
    parser.add_argument("--tokenizers", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--engines", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--gateways", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--engine-flags", nargs="*", default=[], help="further flags of the engines")
    parser.add_argument("--seed", type=int, default=0, help="of faults and clients (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for logs and records; by default a temporary one, which is kept")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    return parser.parse_args(argv)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes of the mesh must not outlive this one
    options = arguments()
    started = time.monotonic()
    try:
        report, broken = uvloop.run(measure(options))
    except (HoldfastError, MeshError, fleet.FleetError, ValueError, OSError) as error:
        sys.exit(f"chaos: {error}")
    print(f"{time.monotonic() - started:.0f} s")
    if options.out:
        report.save(options.out)
    if broken:
        sys.exit("\n".join(["chaos: not all of it held", *broken[:20]]))


if __name__ == "__main__":
    main()
