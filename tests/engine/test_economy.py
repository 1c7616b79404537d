"""Which copy of the weights computes a step, and that nobody else gets what the smaller one computed."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.batch import Step
from services.engine.blocks import BlockPool
from services.engine.build import build
from services.engine.economy import Economy
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import SamplingParams, Sequence, StopRules
from services.engine.settings import EngineSettings
from tests.engine.driver import Driver, sequence

FEW_BITS = "*.down_proj=none,int4-g32"

ALWAYS = Economy(interactive=True, batch=True, itl_target=0.0, wait_target=-1.0)


def economy(*, interactive: bool = True, batch: bool = True) -> Economy:
    """One that saves when a token takes more than 10 ms, or somebody has waited for more than 5 s."""
    return Economy(interactive=interactive, batch=batch, itl_target=0.01, wait_target=5.0)


def next_step(driver: Driver) -> Step:
    """Plans and runs it."""
    step = driver.scheduler.plan(driver.now)
    assert step is not None
    driver.in_flight.append(driver.runner.launch(step))
    driver.step()
    return step


def learn(driver: Driver, *, seconds: float) -> None:
    """The full weights take so long for each token."""
    for tokens in range(1, 20):
        driver.scheduler.paces[False].observe(tokens=tokens, kv_tokens=0, seconds=seconds * tokens, prefills=False)


@pytest.mark.parametrize(("seconds", "saves"), [(0.004, False), (0.006, True)])
def test_steps_are_computed_in_few_bits_while_tokens_would_come_too_slowly(seconds: float, saves: bool) -> None:
    """Two running sequences: the full weights would take twice that for their next tokens."""
    driver = Driver(economy=economy())
    for prompt in ([1, 2], [3, 4]):
        driver.add(sequence(prompt, max_tokens=5, arrival=driver.now))
    assert not next_step(driver).economical, "nothing is known of the pace yet"
    learn(driver, seconds=seconds)
    assert next_step(driver).economical is saves


@pytest.mark.parametrize(("num_sequences", "saves"), [(2, True), (12, False)])
def test_a_copy_that_would_be_slower_is_not_asked(num_sequences: int, saves: bool) -> None:
    """It takes less for a step, and more for each row of it."""
    driver = Driver(num_blocks=64, max_sequences=16, economy=economy())
    for tokens in range(1, 20):
        for economical, seconds in ((False, 0.010 + 0.001 * tokens), (True, 0.004 + 0.002 * tokens)):
            driver.scheduler.paces[economical].observe(tokens=tokens, kv_tokens=0, seconds=seconds, prefills=False)
    for number in range(num_sequences):
        driver.add(sequence([number], max_tokens=9, arrival=driver.now))
    next_step(driver)
    assert next_step(driver).economical is saves


def test_a_long_wait_is_a_reason_too_as_long_as_it_lasts() -> None:
    """Both slots are taken, and a third sequence waits."""
    driver = Driver(max_sequences=2, economy=economy())
    running = [driver.add(sequence([token], max_tokens=20, arrival=0.0)) for token in (1, 2)]
    waiting = driver.add(sequence([3], max_tokens=2, arrival=driver.now))
    saved = [next_step(driver).economical for _ in range(8)]
    assert saved[:4] == [False] * 4
    assert saved[-1]
    for each in running:
        driver.cancel(each)
    next_step(driver)
    assert waiting.started_at is not None
    assert not next_step(driver).economical


@pytest.mark.parametrize("forbidden", ["interactive", "batch"])
def test_a_step_with_a_sequence_that_may_not_have_it_is_computed_in_full(forbidden: str) -> None:
    """Once that is gone, the others save."""
    driver = Driver(economy=economy(**{forbidden: False}))
    learn(driver, seconds=1.0)
    both = {each: driver.add(sequence([1], max_tokens=9, interactive=each)) for each in (True, False)}
    assert not next_step(driver).economical
    driver.cancel(both[forbidden == "interactive"])
    assert next_step(driver).economical


def test_who_may_not_have_it_is_no_reason_to_save() -> None:
    """A batch sequence that waits does not make interactive ones less precise for its sake, if it could not follow them."""
    driver = Driver(max_sequences=1, economy=economy(batch=False))
    driver.add(sequence([1], max_tokens=20, arrival=0.0))
    driver.add(sequence([2], interactive=False, arrival=0.0))
    assert not any(next_step(driver).economical for _ in range(12))


def test_blocks_of_the_small_copy_are_found_by_nobody() -> None:
    """Nor are later ones of the same sequence, which follow from them; what was computed in full before is."""
    driver = Driver(num_blocks=32, economy=economy())
    first = driver.add(sequence(list(range(4)), max_tokens=12))
    for _ in range(2):
        assert not next_step(driver).economical
    learn(driver, seconds=1.0)
    assert next_step(driver).economical
    driver.scheduler.paces[False].observe(tokens=1, kv_tokens=0, seconds=0.0, prefills=False)
    driver.run()
    assert driver.scheduler.totals.num_economical_tokens > 0
    again = driver.add(sequence([*range(4), *first.output_ids], max_tokens=2))
    driver.run()
    assert again.num_cached == 4
    driver.check_all_answered()


def test_without_an_economy_no_step_is() -> None:
    """However slow the engine is."""
    driver = Driver()
    learn(driver, seconds=100.0)
    driver.add(sequence([1], max_tokens=3, arrival=-1000.0))
    assert not any(next_step(driver).economical for _ in range(3))


def run(folder: Path, prompt: list[int], *, saving: Economy | None = None, **settings: object) -> list[int]:
    """Greedy tokens of an engine with these settings."""
    given = EngineSettings(device="cpu", dtype="float32", threads=1, cache_blocks=16, **settings)  # type: ignore[arg-type]
    computer = build(given, folder)
    scheduler = Scheduler(BlockPool(16, block_size=32), Limits(4, 2048, economy=saving))
    only = Sequence("r", 0, prompt, SamplingParams(temperature=0.0), StopRules(60))
    scheduler.add(only)
    steps: deque[Step] = deque()
    while (step := scheduler.plan(1.0)) is not None:
        assert step.economical is (saving is not None)
        steps.append(step)
        scheduler.commit(computer.runner.collect(computer.runner.launch(step)), 1.0)
    assert len(steps) == 60
    return only.output_ids


def test_the_tokens_of_such_steps_are_those_of_the_smaller_weights(stories260k: Path) -> None:
    """Throughout economical, an engine says what one of that format alone says; never, what the full one says."""
    torch.manual_seed(0)
    full, small = (run(stories260k, [1], quantization=rules) for rules in ("none", FEW_BITS))
    assert full != small
    assert run(stories260k, [1], economy=FEW_BITS, saving=ALWAYS) == small
    assert run(stories260k, [1], economy=FEW_BITS) == full


def test_it_is_not_deterministic(stories260k: Path) -> None:
    """Tokens would depend on what else there is to do."""
    with pytest.raises(ConfigurationError, match="not with economy"):
        build(EngineSettings(device="cpu", deterministic=True, economy="int8"), stories260k)
