"""Where requests go."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from holdfast.topics import REQUESTS_INTERACTIVE
from holdfast.v1.generation_pb2 import REQUEST_CLASS_INTERACTIVE
from services.gateway.routing import Routing

PARTITIONS = REQUESTS_INTERACTIVE.num_partitions


def test_open_requests_are_spread_over_all_partitions() -> None:
    """As many as there are partitions: one for each."""
    routing = Routing()
    with ExitStack() as stack:
        chosen = [stack.enter_context(routing.partition(REQUEST_CLASS_INTERACTIVE)) for _ in range(PARTITIONS)]
        assert sorted(chosen) == list(range(PARTITIONS))


def test_a_partition_that_became_free_is_next() -> None:
    """The fewest open requests decide."""
    routing = Routing()
    with ExitStack() as stack:
        for _ in range(PARTITIONS - 1):
            stack.enter_context(routing.partition(REQUEST_CLASS_INTERACTIVE))
        with routing.partition(REQUEST_CLASS_INTERACTIVE) as last:
            pass
        with routing.partition(REQUEST_CLASS_INTERACTIVE) as again:
            assert again == last


@pytest.mark.parametrize("num_engines", [2, 4])
@pytest.mark.parametrize("owner", ["neighbours", "turns"])
@pytest.mark.parametrize("num_requests", [8, 16])
def test_few_requests_meet_every_engine(num_engines: int, owner: str, num_requests: int) -> None:
    """Whether an engine owns neighbouring partitions or every second one, none gets twice its share."""
    routing = Routing()
    counts = [0] * num_engines
    with ExitStack() as stack:
        for _ in range(num_requests):
            partition = stack.enter_context(routing.partition(REQUEST_CLASS_INTERACTIVE))
            engine = partition * num_engines // PARTITIONS if owner == "neighbours" else partition % num_engines
            counts[engine] += 1
    assert 0 < min(counts)
    assert max(counts) <= 2 * num_requests / num_engines
