"""How benchmarks report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.report import Report, percentile, text_table


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, 1.0), (0.01, 1.0), (0.5, 50.0), (0.9, 90.0), (0.99, 99.0), (0.995, 100.0), (1.0, 100.0)],
)
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    """It is the smallest value that the share of all values does not exceed (nearest rank)."""
    assert percentile([float(value) for value in range(100, 0, -1)], share) == expected


def test_the_percentile_of_nothing_is_not_a_number() -> None:
    """A run without answers reports no times."""
    assert math.isnan(percentile([], 0.5))


def test_a_table_lines_its_columns_up() -> None:
    """Names stand to the left, numbers to the right, with the digits that mean something."""
    assert text_table(
        ["", "ms"], [["first", 1.234], ["second", 12345.6], ["third", None], ["tiny", 0.00123]]
    ).splitlines() == [
        "             ms",
        "first      1.23",
        "second   12,346",
        "third         –",
        "tiny    0.00123",
    ]


def test_a_saved_report_says_what_it_ran_on(tmp_path: Path) -> None:
    """A figure is never kept without its machine, versions and settings."""
    report = Report("tax", settings={"model": "tiny"})
    report.table("Times", ["", "ms"], [["first", 1.5]])
    report.save(tmp_path / "results" / "tax.json")
    saved = json.loads((tmp_path / "results" / "tax.json").read_text())
    assert saved["tables"] == [{"title": "Times", "columns": ["", "ms"], "rows": [["first", 1.5]]}]
    assert saved["settings"] == {"model": "tiny"}
    assert saved["machine"]["cores"] >= 1
    assert {"python", "grpcio", "protobuf"} <= saved["versions"].keys()
