"""How long a step takes, learnt from the steps that were."""

from __future__ import annotations

import random

import pytest

from services.engine.pace import Pace


def taught(a: float, b: float, c: float, *, steps: int = 60, noise: float = 0.0) -> Pace:
    pace, dice = Pace(), random.Random(1)
    for _ in range(steps):
        tokens, kv_tokens = dice.randint(1, 300), dice.randint(1, 9000)
        seconds = (a + b * tokens + c * kv_tokens) * (1 + noise * dice.uniform(-1, 1))
        pace.observe(tokens=tokens, kv_tokens=kv_tokens, seconds=seconds, prefills=tokens > 1)
    return pace


def test_the_law_is_found_from_steps_that_follow_it() -> None:
    """Steps that follow a law, with noise, are predicted by it."""
    pace = taught(5e-3, 1e-4, 1e-6, noise=0.1)
    assert pace.seconds(tokens=200, kv_tokens=4000) == pytest.approx(5e-3 + 2e-2 + 4e-3, rel=0.1)
    assert pace.tokens_within(0.05, kv_tokens=4000) == pytest.approx(410, rel=0.1)


def test_a_step_too_long_already_leaves_nothing() -> None:
    """Where the running sequences alone take longer than allowed there is no time for prefill."""
    assert taught(5e-3, 1e-4, 1e-6).tokens_within(8e-3, kv_tokens=9000) == 0


def test_nothing_is_predicted_from_nothing() -> None:
    """Before some steps were seen there is no prediction and no limit."""
    pace = Pace()
    assert pace.seconds(tokens=1, kv_tokens=1) is None
    assert pace.tokens_within(0.1, kv_tokens=0) == float("inf")


def test_no_coefficient_is_negative() -> None:
    """Where longer contexts happened to be faster, they count as free, not as a gain."""
    pace = Pace()
    for tokens in range(1, 30):
        pace.observe(tokens=tokens, kv_tokens=3000 - 100 * tokens, seconds=0.001 * tokens, prefills=True)
    assert pace.tokens_within(0.02, kv_tokens=100_000) <= 21


def test_a_long_run_of_decodes_does_not_wipe_out_what_prefill_costs() -> None:
    """After thousands of equal decode steps a chunk is still predicted by the prefills seen before."""
    pace = taught(5e-3, 1e-4, 0.0)
    for _ in range(5000):
        pace.observe(tokens=4, kv_tokens=4000, seconds=5.4e-3, prefills=False)
    assert pace.seconds(tokens=1000, kv_tokens=4000) == pytest.approx(0.105, rel=0.15)
