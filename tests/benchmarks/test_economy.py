"""Two copies of a model under overload, in small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.economy import COLUMNS, Turn, turn
from benchmarks.load import Request, poisson

SETTINGS = {"threads": 1, "max_sequences": 2, "cache_bytes": 1 << 24, "itl_target_ms": 60_000}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("more", "least", "most"),
    [
        ({}, 0.0, 0.0),
        ({"economy": "int8-weight", "economy_wait_ms": 0}, 0.1, 0.95),
        ({"economy": "int8-weight", "economy_wait_ms": 60_000}, 0.0, 0.0),
    ],
)
def test_the_second_copy_computes_while_somebody_waits(
    more: dict[str, object], least: float, most: float, stories260k: Path
) -> None:
    """And not where it is not there, or where nobody waits long; every answer comes whole, in order."""
    requests = poisson(12, rate=1000, prompt_tokens=8, output_tokens=12, seed=0)
    found = turn(stories260k, SETTINGS | more, requests, seconds=60, seed=0)
    assert least <= found.economical <= most
    assert [len(times) for times in found.answers] == [12] * 12
    assert all(times == sorted(times) and times[0] > 0 for times in found.answers)


def test_what_is_left_at_the_end_is_given_up(stories260k: Path) -> None:
    """With the tokens that came in time, by the clock of requests that come one after the other too."""
    requests = [*poisson(2, rate=1000, prompt_tokens=8, output_tokens=4, seed=0), Request(100.0, 8, 400)]
    found = turn(stories260k, SETTINGS, requests, seconds=100.001, seed=0)
    assert 100.001 <= found.seconds < 102
    first, second, late = map(len, found.answers)
    assert first == second == 4 and late < 400


def test_a_turn_counts_what_came() -> None:
    """A whole answer, half a one, and none, which waited for 1 s until the load ended."""
    requests = [Request(0.0, 8, 3), Request(2.0, 8, 3), Request(3.0, 8, 3)]
    found = Turn(requests, [[1.0, 1.5, 2.0], [0.5, 1.75], []], seconds=4.0, economical=0.25)
    assert dict(zip(COLUMNS, found.row(), strict=True)) == {
        "tokens/s": 1.25, "answers/s": 0.25, "first token p50, s": 1.0, "first token p99, s": 1.0,
        "between tokens p50, ms": 500.0, "between tokens p99, ms": 1250.0, "second copy, %": 25.0,
    }  # fmt: skip
