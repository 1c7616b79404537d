"""Which engines have enough to do, and how fast they answer requests of one class together, as far as the log tells."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.bus import Lag
from holdfast.committed import Committed

SAMPLE_SECONDS = 2.0
"""Least time between two looks that are compared: engines commit once a second, so what waits longer really waits."""

LEAST_SECONDS = 10.0
"""Least time over which a rate is measured."""

MOST_SECONDS = 300.0
"""Most time that is remembered."""

FORGET_SECONDS = 60.0
"""When not all engines were full for so long, all is forgotten: the engines may be others by now."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One partition, as the log tells it."""

    end: int
    """The offset that the next record will get."""
    begun: int
    """Records from here on wait for an engine to take them."""
    num_open: int
    """Records that are not done: they wait, or run."""
    owner: str | None
    """The engine that has it; None while engines share the partitions out anew."""

    @classmethod
    def of(cls, lag: Lag, owner: str | None) -> Standing:
        """What the group committed; records that are no longer kept count as done."""
        if lag.committed is None:
            return cls(lag.end, lag.start, lag.end - lag.start, owner)
        committed = Committed.of(lag.committed)
        first = max(committed.watermark, lag.start)
        num_open = max(0, lag.end - first - committed.num_done)
        return cls(lag.end, max(committed.begun, first), num_open, owner)

    @property
    def num_waiting(self) -> int:
        return max(0, self.end - self.begun)

    @property
    def num_running(self) -> int:
        return max(0, self.num_open - self.num_waiting)

    @property
    def num_done(self) -> int:
        """Ever."""
        return self.end - self.num_open


@dataclass(frozen=True, slots=True)
class _Sample:
    """A time during which requests waited for every engine all along."""

    seconds: float
    num_answered: int


class Turnover:
    """An engine for which a request waited all along from one look to the next is **full**. Speed is measured while all are,
    for only then answers come as fast as they can: what the others answer is what they are asked."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self._before: tuple[float, Sequence[Standing]] | None = None
        self.full: frozenset[int] = frozenset()
        """The partitions of full engines."""
        self.has_room = False
        """Whether some engine is known not to be full."""
        self.rate: float | None = None
        """Requests that are answered in a second; None where too little is known."""
        self._waited_at = 0.0
        """When all engines were last known to be full."""

    def look(self, standings: Sequence[Standing], now: float) -> None:
        """All partitions of the class, as they stand now."""
        owners = [each.owner for each in standings]
        if None in owners:
            self.pause()
        elif self._before is None or owners != [each.owner for each in self._before[1]]:
            self._before = now, standings
        elif now - self._before[0] >= SAMPLE_SECONDS:
            self._compare(standings, now)
            self._before = now, standings
        self.rate = self._rate(sum(each.num_running for each in standings))

    def pause(self) -> None:
        """No engine is there, or they share the partitions out anew: what happens until the next look is nobody's speed."""
        self._before = None

    def _compare(self, standings: Sequence[Standing], now: float) -> None:
        assert self._before is not None
        then, before = self._before
        pairs = list(zip(standings, before, strict=True))
        busy = {each.owner for each, earlier in pairs if each.begun < earlier.end}
        self.full = frozenset(partition for partition, each in enumerate(standings) if each.owner in busy)
        self.has_room = len(self.full) < len(standings)
        if not self.has_room:
            changes = (each.num_done - earlier.num_done for each, earlier in pairs)
            # A partition whose new owner knows less has fewer than before.
            self._samples.append(_Sample(now - then, sum(max(0, change) for change in changes)))
            self._waited_at = now
            while sum(each.seconds for each in self._samples) - self._samples[0].seconds >= MOST_SECONDS:
                self._samples.popleft()
        elif now - self._waited_at > FORGET_SECONDS:
            self._samples.clear()

    def _rate(self, num_running: int) -> float | None:
        """Over as many of the last seconds, at least LEAST_SECONDS, as it took to answer twice as many requests as run now:
        answers that begin together end together, and a shorter time would tell of a pause or a burst. Until so many were
        answered those that run count too, for they may all end now. So it may be up to twice too high: better too much is
        let in than that engines run out of work."""
        seconds, num_answered = 0.0, 0
        for sample in reversed(self._samples):
            seconds += sample.seconds
            num_answered += sample.num_answered
            if seconds >= LEAST_SECONDS and num_answered >= 2 * num_running > 0:
                return num_answered / seconds
        if seconds >= MOST_SECONDS:
            return num_answered / seconds
        if seconds < LEAST_SECONDS or num_answered + num_running == 0:
            return None
        return (num_answered + num_running) / seconds
