"""What both programs are told alike, and how they run and end."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.chaos.fleet import FleetError
from benchmarks.mesh import MeshError
from benchmarks.options import clear_errors
from benchmarks.report import Report

Findings = tuple[Report, Sequence[str]]
"""The report, and what did not hold."""


def add_options(parser: argparse.ArgumentParser, *, lengths: Sequence[int]) -> None:
    """Those that both have. `lengths`: of answers, by default."""
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a folder, or the name of a model (%(default)s)"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(lengths), help="tokens of an answer (%(default)s)"
    )
    parser.add_argument("--engine-flags", nargs="*", default=[], help="further flags of the engines")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for logs and records; by default a temporary one, which is kept")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")


def report_of(name: str, options: argparse.Namespace) -> Report:
    """An empty one."""
    return Report(name, settings={key: str(value) for key, value in vars(options).items() if key != "out"})


def folder_of(options: argparse.Namespace) -> Path:
    """Where logs and records go. Told, as that is where to look when something does not hold."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="holdfast-chaos-"))
    print(f"logs and records: {folder}")
    return Path(folder)


def run(
    name: str, measure: Callable[[argparse.Namespace], Coroutine[Any, Any, Findings]], options: argparse.Namespace
) -> None:
    """The program: it ends with an error where something did not hold."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes of the mesh must not outlive this one
    started = time.monotonic()
    with clear_errors(name, MeshError, FleetError, ValueError, OSError):
        report, broken = uvloop.run(measure(options))
    print(f"{time.monotonic() - started:.0f} s")
    if options.out:
        report.save(options.out)
    if broken:
        sys.exit("\n".join([f"{name}: not all of it held", *broken[:20]]))
