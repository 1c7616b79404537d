"""The benchmark of a running mesh, against a gateway that plays what it is given."""

from __future__ import annotations

import pytest

from benchmarks.load import Request
from benchmarks.online import Objectives, Outcome, arguments, measure
from holdfast.errors import Overloaded
from tests.holdfast.fake_gateway import FakeGateway, accepted, finished, serving, tokens


def table(report_tables: list[dict[str, object]], title: str) -> dict[str, float]:
    """A table's first two columns."""
    (rows,) = (each["rows"] for each in report_tables if each["title"] == title)
    return {row[0]: row[1] for row in rows}  # type: ignore[attr-defined]


async def test_complete_answers_are_timed_and_counted() -> None:
    """Every answer with all its tokens counts, and its lengths are those asked for."""
    gateway = FakeGateway([accepted(), tokens(0, "a"), tokens(1, "b", num_tokens=3), finished()])
    async with serving(gateway) as server:
        load = ["--requests", "5", "--rate", "1000", "--prompt", "7", "--output", "4", "--warmup", "1"]
        report = await measure(arguments(["--address", server.address, *load]))
    assert table(report.tables, "Answers") == {"complete": 5}
    assert table(report.tables, "Latency, ms")["end to end"] > 0
    _, *counted = gateway.requests
    assert {(len(request.token_ids.ids), request.stop.max_tokens) for request in counted} == {(7, 4)}


async def test_refusals_and_short_answers_are_no_answers() -> None:
    """What was refused or ended early is counted by its kind and lends no time to the percentiles."""
    gateway = FakeGateway([Overloaded("full", retry_after=1.0)])
    async with serving(gateway) as server:
        report = await measure(arguments(["--address", server.address, "--requests", "3", "--rate", "1000"]))
        assert table(report.tables, "Answers") == {"complete": 0, "Overloaded": 3}
        assert len(report.tables) == 1
        gateway.answer = [accepted(), tokens(0, "a"), finished()]
        report = await measure(arguments(["--address", server.address, "--requests", "3", "--rate", "1000"]))
        assert table(report.tables, "Answers") == {"complete": 0, "EndedEarly": 3}


async def test_a_load_that_the_model_cannot_take_is_refused() -> None:
    """A request longer than the model's context stops the run before it starts, and says what to do."""
    async with serving(FakeGateway()) as server:
        with pytest.raises(ValueError, match="a request has 600 tokens and tiny takes 512"):
            await measure(arguments(["--address", server.address, "--prompt", "500", "--output", "100"]))


@pytest.mark.parametrize(
    ("first", "last", "error", "met"),
    [(0.5, 1.4, "", True), (0.6, 1.4, "", False), (0.5, 1.6, "", False), (0.1, 0.2, "Unavailable", False)],
)
def test_goodput_counts_answers_that_met_both_objectives(first: float, last: float, error: str, met: bool) -> None:
    """A request is good if its first token and its tokens on average came in time, and it was answered."""
    outcome = Outcome(Request(0.0, 8, 11), first_token=first, last_token=last, tokens=11, error=error)
    assert Objectives(first_token=0.5, per_token=0.1).met(outcome) is met
