"""The benchmarks of the engine alone, on a model small enough for a test."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_parity, offline
from benchmarks.report import Report


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(report: Report, title: str) -> list[list[Any]]:
    """Of the table whose title begins so."""
    return next(table["rows"] for table in report.tables if str(table["title"]).startswith(title))  # type: ignore[return-value]


async def test_the_workloads_run_at_any_scale(stories260k: Path) -> None:
    """A, B and C give one row each, or one for each batch, of sensible numbers."""
    arguments = argparse.Namespace(
        model=str(stories260k), device="cpu", dtype="auto", load_format="dummy", implementation="auto", threads=1,
        work="ABC", batches=[1, 3], requests=5, scale=0.02, cache_gib=1, set=[], out=None,
    )  # fmt: skip
    report = await offline.measure(arguments)
    assert [row[0] for row in rows(report, "A")] == ["5"]
    assert [row[0] for row in rows(report, "B")] == ["1", "3"]
    assert rows(report, "C")[0][0] == "16 × 41"
    assert all(rate > 0 for table in "AC" for row in rows(report, table) for rate in row[1:])


async def test_ours_and_transformers_say_the_same_in_float32(stories260k: Path) -> None:
    """The comparison compares like with like: every token of every pair agrees."""
    arguments = argparse.Namespace(
        model=str(stories260k), dtypes="float32", batches=[1, 3], pairs=1, prompt=9, output=12, threads=1, out=None
    )
    report = await cpu_parity.compare(arguments)
    found = rows(report, stories260k.name)
    assert [(row[0], row[1], row[-1]) for row in found] == [("float32", "1", "100%"), ("float32", "3", "100%")]


def test_transformers_passes_no_end_of_sequence_token_over(stories260k: Path, tmp_path: Path) -> None:
    """An answer goes on behind such a token, as our engine's does, and has it where it is the likeliest."""
    (usual,) = cpu_parity.Theirs(stories260k, torch.float32).answers([[1, 2]], 8)
    for file in stories260k.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((stories260k / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": usual[3]}))
    assert cpu_parity.Theirs(tmp_path, torch.float32).answers([[1, 2]], 8) == [usual]


def test_a_ratio_below_its_goal_is_called_missed() -> None:
    """The median of the pairs decides, of decode against the goal and of prefill and the whole against one."""
    ours = [cpu_parity.Turn(1.0, 2.0)] * 3
    theirs = [cpu_parity.Turn(prefill, 2 * prefill) for prefill in (0.9, 1.5, 1.5)]
    pairs = cpu_parity.Pairs(ours, theirs, num_equal=6, num_tokens=8)
    assert cpu_parity.row("bfloat16", 1, pairs, 5) == [
        "bfloat16", "1", 4.0, 4 / 1.5, 1.5, "0.90 to 1.50", "≥ 1.4", 1.5, 1.5, "75%",
    ]  # fmt: skip
    assert cpu_parity.row("bfloat16", 16, pairs, 5)[6] == "≥ 1.8, MISSED"
    slow_prefill = cpu_parity.Pairs(ours, [cpu_parity.Turn(0.5, 3.0)] * 3, num_equal=1, num_tokens=1)
    assert cpu_parity.row("bfloat16", 1, slow_prefill, 5)[6] == "≥ 1.4, MISSED"
