"""How a benchmark reports: what it ran on, a table for a person, the same as JSON to keep.

A figure without its machine, versions and command says nothing, so a report always carries them:

    report = Report("tax", settings={"model": "smollm2-135m-instruct"})
    report.table("Added time to the first token, ms", ["bus", "p50", "p99"], [["memory", 1.2, 2.0]])
    report.save(Path("tax.json"))
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Cell = str | int | float | None

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "grpcio", "protobuf", "aiokafka", "uvloop")
"""The packages whose versions change figures."""


@dataclass(slots=True)
class Report:
    """What one run of a benchmark found. Tables are printed as they are added."""

    name: str
    settings: Mapping[str, object]
    """What was measured, and under which load."""
    tables: list[dict[str, object]] = field(default_factory=list)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Adds a table and prints it."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        print(f"\n{title}\n{text_table(columns, rows)}")

    def save(self, path: Path) -> None:
        """Writes everything to a file, its folder made where it is missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten to {path}")

    def as_dict(self) -> dict[str, object]:
        return {
            "benchmark": self.name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", f"benchmarks.{self.name}", *sys.argv[1:]]),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "settings": dict(self.settings),
            "tables": self.tables,
        }


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Rows in columns, the first to the left, the others to the right."""
    cells = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    )


def _text(cell: Cell) -> str:
    """A number with about four digits that mean something."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        size = abs(cell)
        return f"{cell:.3g}" if 0 < size < 0.1 else f"{cell:,.{0 if size >= 1000 else 1 if size >= 100 else 2}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them (0 to 1) does not exceed. No values: not a number."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def machine() -> dict[str, Cell]:
    """The processor, how much of it this process may use, memory, and the accelerator if PyTorch is there and sees one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(memory / 2**30, 1),
        "accelerator": _accelerator(),
        "system": platform.platform(),
        "load_average_at_end": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _accelerator() -> str | None:
    """Asked of a PyTorch that the benchmark has loaded already; it is not loaded for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"


def versions() -> dict[str, str]:
    """Python's and those of the packages that are installed among `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
