"""Which suspect begins next."""

from __future__ import annotations

from services.engine.trials import Trials


def test_one_is_on_trial_at_a_time_the_least_first() -> None:
    """The next one when that is over, and none where none waits."""
    trials: Trials[int] = Trials(lambda number: number)
    for number in (3, 1, 2):
        trials.add(number)
    assert (trials.next(), trials.next(), trials.on_trial) == (1, None, 1)
    trials.over(1)
    assert trials.next() == 2
    trials.over(2)
    assert (trials.next(), trials.on_trial) == (3, 3)
    trials.over(3)
    assert (trials.next(), trials.on_trial) == (None, None)


def test_one_that_waits_may_go_and_others_are_nothing_to_it() -> None:
    """A suspect that is another engine's meanwhile is not begun; whoever was never suspected changes nothing."""
    trials: Trials[str] = Trials(lambda name: name)
    for name in ("a", "b", "c"):
        trials.add(name)
    assert trials.next() == "a"
    trials.over("b")
    trials.over("never suspected")
    assert trials.on_trial == "a"
    trials.over("a")
    trials.over("a")
    assert trials.next() == "c"
