"""The log's protocol as a whole: a randomised model of engines, gateways and faults around `holdfast.ownership`."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.holdfast.protocol_model import Variant, World, run_many


@settings(max_examples=1_500, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_the_protocol_keeps_its_promises(seed: int) -> None:
    """Whatever dies, freezes, wakes, comes late or twice: all readers have one coherent text of each choice, complete to
    its end; a new owner goes on from exactly what they accepted; and nobody waits for ever (`World` raises a Fault)."""
    World(random.Random(seed)).run()


@pytest.mark.parametrize("variant", [each for each in Variant if each is not Variant.OURS])
def test_the_model_finds_the_fault_of(variant: Variant) -> None:
    """Each protocol that is known to be wrong breaks a promise in one of the first runs: the model is not blind."""
    assert run_many(variant, range(3_000), until_found=True).num_faults == 1, variant.value


def test_the_model_meets_what_it_is_for() -> None:
    """Every kind of event happens, again and again, in a few hundred runs."""
    result = run_many(Variant.OURS, range(500))
    assert result.num_faults == 0
    often = {name for name, num_runs in result.runs_with.items() if num_runs >= 5}
    assert often >= {
        "requests taken over in mid-text",
        "tokens that land behind a later owner's marker",
        "markers that land behind a later owner's marker",
        "records ignored by readers",
        "requests fetched by zombies",
        "deliveries of what runs here already",
        "partitions kept through a rebalance",
        "tenures given up: a higher epoch",
        "groups made anew",
        "owners that work on beside another",
        "markers for gateways that know no epoch",
        "records that are sent again though the log has them",
        "gateways that start again",
        "readers that begin in mid-log",
        "cursors with an epoch below the newest",
        "requests given up",
        "poison requests given up",
        "engines that a poison request ended",
        "choices ended outright",
    }
