"""Every topic of the log."""

from __future__ import annotations

from holdfast.topics import CONTROL, REQUESTS


def test_a_cancellation_is_kept_as_long_as_the_request_that_it_is_meant_for() -> None:
    """Of any class: an engine that takes the request hears of it, however long that waited."""
    assert all(CONTROL.retention >= topic.retention for topic in REQUESTS.values())
