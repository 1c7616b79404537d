"""What is let in and what is refused while more comes than engines can answer."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from holdfast.errors import Overloaded
from services.gateway.backlog import MOST_SECONDS, UNKNOWN_SECONDS, Backlog, come_back
from services.gateway.turnover import FORGET_SECONDS, Standing, Turnover
from tests.gateway.fleet import NUM_PARTITIONS, WATCH_SECONDS, Fleet

BUDGET = 30.0


def backlog(*, max_wait: float = BUDGET, max_waiting: int = 10_000, **given: Callable[[str], None]) -> Backlog:
    return Backlog("interactive", NUM_PARTITIONS, max_wait=max_wait, max_waiting=max_waiting, **given)


def lengths(kind: str, mean: float, draw: random.Random) -> Callable[[], float]:
    """Of requests: all alike, as a benchmark's; or as people's, a few of them long."""
    return {"alike": lambda: mean, "mixed": lambda: draw.expovariate(1 / mean)}[kind]


def offer(fleet: Fleet, *, rate: float, seconds: float, draw: random.Random, comes_back: bool = False) -> None:
    """So many new requests a second, at random times; whoever is refused `comes_back` when told to, or stays away."""
    end = fleet.now + seconds
    arrivals = [fleet.now + draw.expovariate(rate)]
    new = arrivals[0]
    while arrivals and (at := heapq.heappop(arrivals)) < end:
        fleet.until(at)
        if not fleet.send() and comes_back:
            heapq.heappush(arrivals, at + fleet.refused[-1][1].retry_after)
        if at == new:
            new += draw.expovariate(rate)
            heapq.heappush(arrivals, new)
    fleet.until(end)


@pytest.mark.parametrize("num_engines", [1, 4])
@pytest.mark.parametrize(("num_slots", "mean"), [(4, 1.0), (64, 8.0), (128, 20.0)])
@pytest.mark.parametrize("kind", ["alike", "mixed"])
@pytest.mark.parametrize("comes_back", [False, True])
def test_three_times_what_can_be_answered(
    kind: str, num_slots: int, mean: float, comes_back: bool, num_engines: int
) -> None:
    """For minutes: engines never run out of work; whoever is let in waits not much longer than the budget once that is
    known; all others are told when to come back. Afterwards nobody is refused, and what waits is gone, by itself."""
    draw = random.Random(1)
    fleet = Fleet(backlog(), num_slots=num_slots, seconds=lengths(kind, mean, draw), num_engines=num_engines)
    capacity = num_slots / mean
    offer(fleet, rate=capacity / 3, seconds=60, draw=draw)
    assert not fleet.refused
    began = fleet.now
    offer(fleet, rate=3 * capacity, seconds=180, draw=draw, comes_back=comes_back)

    warm = began + mean  # the first ones fill the slots
    answered = sum(warm < each.ended_at <= fleet.now for each in fleet.served)
    assert answered >= 0.9 * capacity * (fleet.now - warm)
    waits = [each.begun_at - each.came_at for each in fleet.served if each.came_at > began + 3 * mean + 10]
    assert max(waits) < 2.5 * BUDGET
    assert sorted(waits)[len(waits) // 2] < 1.5 * BUDGET
    retries = [error.retry_after for _, error in fleet.refused]
    assert len(retries) > capacity
    assert min(retries) >= 1
    assert max(retries) <= MOST_SECONDS
    assert sum(retries) / len(retries) > BUDGET / 3

    calm = fleet.now
    offer(fleet, rate=capacity / 3, seconds=180, draw=draw)
    assert max((at for at, _ in fleet.refused), default=0.0) < calm + BUDGET
    assert fleet.num_waiting <= 2
    assert fleet.backlog.wait is not None or fleet.backlog.num_waiting <= num_slots


def test_a_minute_of_three_times_what_can_be_answered_costs_nothing() -> None:
    """The answers of that minute and of the time in which what waits is worked off: as many as there could be."""
    draw = random.Random(2)
    fleet = Fleet(backlog(), num_slots=64, seconds=lengths("mixed", 4.0, draw))
    capacity = 16.0
    offer(fleet, rate=3 * capacity, seconds=60, draw=draw)
    busy = [each for each in fleet.served if 10 < each.ended_at <= 60]
    assert len(busy) >= 0.9 * 50 * capacity
    num_let_in = len(fleet.served) + fleet.num_waiting
    fleet.until(200)
    assert fleet.num_waiting == 0
    assert len(fleet.served) >= num_let_in
    fleet.send()
    assert fleet.backlog.num_waiting <= 1


def test_a_burst_between_two_looks_counts_at_once() -> None:
    """What came since the log was asked waits too, or is on its way: no look is needed to refuse what follows."""
    draw = random.Random(3)
    fleet = Fleet(backlog(), num_slots=8, seconds=lengths("alike", 1.0, draw))
    offer(fleet, rate=24, seconds=31, draw=draw)
    at = fleet.now
    while fleet.send() and len(fleet.served) < 1000:
        pass
    assert fleet.now == at
    assert fleet.num_waiting <= 2.5 * BUDGET * 8
    assert fleet.refused[-1][0] == at


def test_requests_on_their_way_to_the_log_count() -> None:
    """Those that were admitted and are not published yet, and no longer where they fail before."""
    waiting = backlog(max_waiting=2)
    with waiting.entering(), waiting.entering():
        assert waiting.num_waiting == 2
        with pytest.raises(Overloaded, match="2 interactive requests wait for an engine, and no more than 2 may wait"):
            waiting.check(None)
    assert waiting.num_waiting == 0
    waiting.check(None)


def test_nothing_is_refused_for_what_is_not_known() -> None:
    """While no rate is known only the number of those that wait is bounded."""
    refused: list[str] = []
    fleet = Fleet(backlog(max_waiting=500, refused=refused.append), num_slots=4, seconds=lambda: 60.0)
    assert all(fleet.send() for _ in range(500))
    fleet.until(WATCH_SECONDS)
    assert all(fleet.send() for _ in range(4)), "as many run"
    assert fleet.backlog.wait is None
    assert not fleet.send()
    assert refused == ["waiting"]
    ((_, error),) = fleet.refused
    assert UNKNOWN_SECONDS / 2 <= error.retry_after <= UNKNOWN_SECONDS


def test_while_no_engine_is_there_requests_wait_up_to_a_bound() -> None:
    """However slow the engines were that left. When some come back what waits is worked off, and then all is as before."""
    draw = random.Random(4)
    fleet = Fleet(backlog(max_waiting=300), num_slots=4, seconds=lambda: 1.0)
    offer(fleet, rate=12, seconds=30, draw=draw)
    fleet.resize(0)
    fleet.until(fleet.now + 10)
    assert fleet.backlog.wait is None
    while fleet.send():
        pass
    assert fleet.num_waiting == 300
    fleet.resize(4)
    fleet.until(fleet.now + 20)
    assert not fleet.send()
    fleet.until(fleet.now + 60)
    assert fleet.send()


def test_what_is_left_to_the_log_waits_too() -> None:
    """Requests that nobody follows are seen to end by the log alone."""
    fleet = Fleet(backlog(), num_slots=2, seconds=lambda: 1.0)
    for _ in range(10):
        fleet.send(followed=False)
    assert fleet.backlog.num_waiting == 10
    fleet.until(2 * WATCH_SECONDS)
    assert fleet.backlog.num_waiting == fleet.num_waiting
    fleet.until(20)
    assert fleet.backlog.num_waiting == 0


def test_a_request_that_could_not_be_answered_in_its_time_is_refused() -> None:
    """Its own timeout is a budget too."""
    refused: list[str] = []
    draw = random.Random(5)
    fleet = Fleet(backlog(refused=refused.append), num_slots=8, seconds=lengths("alike", 1.0, draw))
    offer(fleet, rate=16, seconds=30, draw=draw)
    assert fleet.send(time_left=60)
    assert not fleet.send(time_left=2)
    assert refused[-1] == "wait"


def test_loads_are_what_is_open_here_and_elsewhere() -> None:
    """Requests followed here at once, those of others as the log told them, those left to the log until it tells of them;
    and what ended here counts no more, though engines have not committed it."""
    here = backlog()
    fleet = Fleet(here, num_slots=2, seconds=lambda: 1.0)
    assert here.loads == [0, 0, 0, 0]
    for _ in range(3):
        fleet.send()
    assert here.loads == [1, 0, 1, 1]
    fleet.send(followed=False)
    assert here.loads == [1, 1, 1, 1]
    fleet.until(1.5)
    assert here.loads == [0, 1, 1, 0]
    with here.entering() as entry:
        here.goes_to(entry, 1)
        here.published(entry)
        told = here.ask()
        told([Standing(end=9, begun=8, num_open=3, owner="engine-0")] * NUM_PARTITIONS, True, fleet.now)
        assert here.loads == [2, 3, 3, 2], "of the three in the first and the last one each ended here a moment ago"
        here.answered(entry)
    assert here.loads == [2, 2, 3, 2]
    fleet.until(20)
    assert here.loads == [0, 0, 0, 0]


def test_an_old_rate_is_forgotten() -> None:
    """Once nothing has waited for a minute the engines may be others."""
    draw = random.Random(6)
    fleet = Fleet(backlog(), num_slots=4, seconds=lambda: 1.0)
    offer(fleet, rate=12, seconds=30, draw=draw)
    assert fleet.backlog.wait
    fleet.until(fleet.now + 60)
    fleet.send()
    fleet.until(fleet.now + FORGET_SECONDS + 10)
    for _ in range(50):
        fleet.send()
    fleet.until(fleet.now + 3 * WATCH_SECONDS)
    assert fleet.num_waiting
    assert fleet.backlog.wait is None


def test_a_few_requests_are_no_measure_of_speed() -> None:
    """Engines that had nothing to do for most of the time are not slow: a hundred requests at once are let in."""
    draw = random.Random(7)
    fleet = Fleet(backlog(), num_slots=64, seconds=lengths("mixed", 4.0, draw))
    offer(fleet, rate=0.5, seconds=120, draw=draw)
    assert all(fleet.send() for _ in range(100))


@pytest.mark.parametrize("prompt", [None, 7])
def test_an_engine_that_hangs_leaves_the_others_theirs(prompt: int | None) -> None:
    """Two records wait for it for ever; the others, which are asked now and then, have room: nobody is refused, and once
    that is known nobody else is sent to it, not those either whose prefix it had."""
    draw = random.Random(8)
    fleet = Fleet(backlog(), num_slots=64, seconds=lambda: 1.0, num_engines=4)
    for _ in range(4):  # whoever has the prefix
        fleet.send(prompt=prompt)
    fleet.until(10)
    hung = 0
    fleet.hang(hung)
    for _ in range(2):
        fleet.send(partition=hung)
    fleet.until(20)
    stuck = fleet.num_waiting_at(hung)
    for _ in range(60):
        for _ in range(draw.randrange(1, 4)):
            fleet.send(prompt=prompt)
        fleet.until(fleet.now + 10)
    assert not fleet.refused
    assert fleet.backlog.wait == 0
    assert fleet.num_waiting == fleet.num_waiting_at(hung) == stuck


def test_an_engine_that_hangs_costs_no_more_than_itself_in_an_overload() -> None:
    """The others answer as much as they can; what they can is what the rate says, so too much is refused all the same."""
    draw = random.Random(9)
    fleet = Fleet(backlog(), num_slots=64, seconds=lengths("mixed", 4.0, draw), num_engines=4)
    fleet.hang(1)
    capacity = 12.0
    offer(fleet, rate=3 * capacity, seconds=180, draw=draw)
    assert sum(10 < each.ended_at for each in fleet.served) >= 0.9 * 170 * capacity
    assert len(fleet.refused) > capacity
    assert fleet.num_waiting < 2.5 * BUDGET * capacity
    calm = fleet.now
    fleet.until(calm + 2 * BUDGET)
    offer(fleet, rate=capacity / 3, seconds=180, draw=draw)
    assert max(at for at, _ in fleet.refused) <= calm
    assert fleet.num_waiting - fleet.num_waiting_at(1) <= 2


def test_a_burst_after_a_pause_is_not_measured_by_what_was_before() -> None:
    """Slots are free, however slow the engines were a moment ago; once requests wait for them the old rate is good again."""
    draw = random.Random(10)
    fleet = Fleet(backlog(), num_slots=64, seconds=lengths("alike", 16.0, draw), num_engines=2)
    offer(fleet, rate=12, seconds=60, draw=draw)
    assert fleet.refused
    fleet.until(fleet.now + 50)
    assert fleet.num_waiting == 0
    fleet.refused.clear()
    assert all(fleet.send() for _ in range(200)), "fifty seconds of work by the old rate"
    fleet.until(fleet.now + 3 * WATCH_SECONDS)
    assert not fleet.send()


def test_a_request_that_its_reader_left_waits_on() -> None:
    """Its place is nobody else's before the log says that an engine took it."""
    fleet = Fleet(backlog(max_waiting=1), num_slots=0, seconds=lambda: 1.0)
    fleet.send(followed=False)
    assert (fleet.backlog.num_waiting, sum(fleet.backlog.loads)) == (1, 1)
    assert not fleet.send()
    fleet.until(2 * WATCH_SECONDS)
    assert (fleet.backlog.num_waiting, sum(fleet.backlog.loads)) == (1, 1)


def test_while_engines_share_partitions_out_nothing_is_measured() -> None:
    """A partition that nobody has, or somebody else than at the look before, is nobody's speed."""
    turnover = Turnover()
    for now in range(0, 40, 2):
        turnover.look([Standing(100 + now, now, 100, "a"), Standing(100, 0, 100, "b" if now % 4 else None)], now)
        turnover.look([Standing(100 + now, now, 100, "a"), Standing(100, 0, 100, "a" if now % 4 else "b")], now + 1)
    assert (turnover.rate, turnover.has_room, turnover.full) == (None, False, frozenset())


@pytest.mark.parametrize("seconds", [0.0, 0.5, 8.0, 40.0, 1e6, float("inf")])
def test_those_refused_together_do_not_come_back_together(seconds: float) -> None:
    """Somewhere in the second half of what it takes, at least a second and at most a minute."""
    drawn = {come_back(seconds) for _ in range(100)}
    told = min(MOST_SECONDS, seconds)
    assert min(drawn) >= max(1.0, told / 2)
    assert max(drawn) <= max(1.0, told)
    assert len(drawn) > 50 or seconds <= 1
