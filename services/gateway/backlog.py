"""What of one class of requests waits in the log, for how long a new one would, and whether that is too long."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from holdfast.errors import Overloaded
from services.gateway.turnover import Standing, Turnover

UNKNOWN_SECONDS = 10.0
"""What is told for a wait of which nothing is known."""

MOST_SECONDS = 60.0
"""The longest that anybody is told to stay away."""


def come_back(seconds: float) -> float:
    """The `retry_after` of a refusal, where what is ahead takes about so many seconds: drawn from their second half, so that
    those who were refused together do not come back together, and come back before the engines run out of work. From one
    second to MOST_SECONDS."""
    return max(1.0, min(MOST_SECONDS, seconds) * random.uniform(0.5, 1.0))


@dataclass(slots=True)
class Entry:
    """One request on its way to the log, and then, where somebody here follows it, to its end."""

    partition: int | None = None
    """Where it goes, once that is chosen."""
    is_published: bool = False
    is_answered: bool = False
    """Whether its end was seen here."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """What this gateway has done so far."""

    num_published: int
    num_ended: int
    open: list[int]
    """For each partition requests that somebody here follows."""
    ended: list[int]
    """For each partition requests whose end was seen here."""
    left: list[int]
    """For each partition requests that nobody here follows any more: they wait or run on, and the log alone tells of their end."""


class Backlog:
    """Knows what the log told at the last look, and what this gateway has done since. Between two looks of several gateways
    each knows of its own requests alone: together they may let in too many for as long as that."""

    def __init__(
        self,
        name: str,
        num_partitions: int,
        *,
        max_wait: float,
        max_waiting: int,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`name`: the class, for people. `max_wait`: most seconds that a request may have to wait for an engine.
        `max_waiting`: most requests that may wait, whatever is known. `refused`: told of each refusal."""
        self._name = name
        self._max_wait = max_wait
        self._max_waiting = max_waiting
        self._refused = refused
        self._turnover = Turnover()
        self._num_coming = 0
        self._num_published = self._num_ended = 0
        self._open, self._ended, self._left = ([0] * num_partitions for _ in range(3))
        # As of the last look.
        self._asked = self._counts()
        self._others = [0] * num_partitions
        self._num_waiting = 0
        self._has_engines = False

    # What is known.

    @property
    def num_waiting(self) -> int:
        """Requests that wait for an engine: those of the last look, and those of this gateway that came since, less as
        many as it saw end, for each left its place to another."""
        since = self._num_published - self._asked.num_published + self._num_coming
        return max(0, self._num_waiting + since - (self._num_ended - self._asked.num_ended))

    @property
    def wait(self) -> float | None:
        """Seconds until an engine would take a new request: none while one has room. None where nobody knows: no engine is
        there, or not all of them had to be waited for of late."""
        if not (ahead := self.num_waiting):
            return 0.0
        if not self._has_engines:
            return None
        if self._turnover.has_room:
            return 0.0
        rate = self._turnover.rate
        if rate is None:
            return None
        return ahead / rate if rate else float("inf")

    @property
    def full(self) -> frozenset[int]:
        """The partitions of engines that have enough to do, as of the last look."""
        return self._turnover.full

    @property
    def loads(self) -> list[int]:
        """For each partition the requests that wait there or run: those that are followed here, those of others as of the
        last look, and those that were left to the log since."""
        left = zip(self._left, self._asked.left, strict=True)
        return [
            open_here + others + now - then
            for open_here, others, (now, then) in zip(self._open, self._others, left, strict=True)
        ]

    def check(self, time_left: float | None) -> None:
        """Whether a new request may come in. `time_left`: seconds until nobody wants its answer.

        Raises:
            Overloaded: too many wait, or it would have to wait too long.
        """
        ahead, wait = self.num_waiting, self.wait
        budget = self._max_wait if time_left is None else min(self._max_wait, time_left)
        if wait is not None and wait > budget:
            reason, why = "wait", f"a new one would wait for more than {budget:.3g} seconds"
        elif ahead >= self._max_waiting:
            reason, why = "waiting", f"no more than {self._max_waiting} may wait"
        else:
            return
        self._refused(reason)
        retry_after = come_back(wait or UNKNOWN_SECONDS)
        raise Overloaded(
            f"{ahead} {self._name} requests wait for an engine, and {why}; try again in {retry_after:.0f} seconds",
            retry_after=retry_after,
        )

    # What is done here.

    @contextmanager
    def entering(self) -> Iterator[Entry]:
        """Counts a request that may come in, while the block runs, as it comes in, goes on and ends."""
        entry = Entry()
        self._num_coming += 1
        try:
            yield entry
        finally:
            self._leave(entry)

    def goes_to(self, entry: Entry, partition: int) -> None:
        """The partition is chosen."""
        entry.partition = partition
        self._open[partition] += 1

    def published(self, entry: Entry) -> None:
        """The log has it."""
        entry.is_published = True
        self._num_coming -= 1
        self._num_published += 1

    def answered(self, entry: Entry) -> None:
        """Its end was seen. Where the block ends without, it waits or runs on."""
        entry.is_answered = True

    def _leave(self, entry: Entry) -> None:
        if entry.partition is not None:
            self._open[entry.partition] -= 1
        if not entry.is_published:
            self._num_coming -= 1
        elif entry.partition is not None and entry.is_answered:
            self._num_ended += 1
            self._ended[entry.partition] += 1
        elif entry.partition is not None:
            self._left[entry.partition] += 1

    # What the log tells.

    def ask(self) -> Callable[[Sequence[Standing], bool, float], None]:
        """To be called before the log is asked; returns what is to be told its answer: how each partition stands, whether
        there are engines, and the time."""
        asked = self._counts()

        def told(standings: Sequence[Standing], has_engines: bool, now: float) -> None:
            # What ended here of late may not be committed yet, and so look as if others had it open.
            ended = zip(asked.ended, self._asked.ended, strict=True)
            ours = [num_open + now - then for num_open, (now, then) in zip(asked.open, ended, strict=True)]
            self._others = [max(0, each.num_open - own) for each, own in zip(standings, ours, strict=True)]
            self._num_waiting = sum(each.num_waiting for each in standings)
            self._has_engines = has_engines
            self._asked = asked
            if has_engines:
                self._turnover.look(standings, now)
            else:
                self._turnover.pause()

        return told

    def _counts(self) -> _Counts:
        return _Counts(self._num_published, self._num_ended, self._open[:], self._ended[:], self._left[:])
