"""Engines without engines: what a log would tell of them, in a time of their own."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from holdfast.bus import Lag
from holdfast.committed import Committed
from holdfast.errors import Overloaded
from services.gateway.backlog import Backlog, Entry
from services.gateway.turnover import Standing

COMMIT_SECONDS = 1.0
WATCH_SECONDS = 2.0
NUM_PARTITIONS = 4


@dataclass
class Partition:
    """One partition as engines see it."""

    end: int = 0
    begun: int = 0
    done: set[int] = field(default_factory=set)
    committed: Committed = field(default_factory=lambda: Committed(0, 0))

    def commit(self) -> None:
        watermark = self.committed.watermark
        while watermark in self.done:
            watermark += 1
        ranges = [(offset, offset) for offset in sorted(self.done) if offset > watermark]
        self.committed = Committed(watermark, self.begun, ranges)

    def standing(self) -> Standing:
        return Standing.of(Lag(self.end, self.committed.position()))


@dataclass(frozen=True)
class Served:
    """One request that was let in."""

    came_at: float
    begun_at: float
    ended_at: float


class Fleet:
    """So many slots behind a log, a gateway's backlog before it, and a clock that is moved by hand."""

    def __init__(self, backlog: Backlog, *, num_slots: int, seconds: Callable[[], float]) -> None:
        """`seconds`: how long the next request takes."""
        self.backlog = backlog
        self.now = 0.0
        self.num_slots = num_slots
        self.served: list[Served] = []
        self.refused: list[tuple[float, Overloaded]] = []
        self._seconds = seconds
        self._partitions = [Partition() for _ in range(NUM_PARTITIONS)]
        self._waiting: deque[tuple[int, int, float, ExitStack]] = deque()
        self._running: list[tuple[float, int, int, float, float, ExitStack]] = []
        self._num_sent = 0
        self._next_commit, self._next_look = COMMIT_SECONDS, 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def send(self, *, followed: bool = True, time_left: float | None = None) -> bool:
        """A request, let in or refused."""
        try:
            self.backlog.check(time_left)
        except Overloaded as error:
            self.refused.append((self.now, error))
            return False
        life = ExitStack()
        entry: Entry = life.enter_context(self.backlog.entering())
        partition = self._num_sent % NUM_PARTITIONS
        self.backlog.goes_to(entry, partition)
        self.backlog.published(entry, followed=followed)
        if not followed:
            life.close()
        self._num_sent += 1
        self._waiting.append((partition, self._partitions[partition].end, self.now, life))
        self._partitions[partition].end += 1
        self._begin()
        return True

    def until(self, then: float) -> None:
        """Time passes: requests end, engines commit, the gateway looks."""
        while (event := min(self._next_end, self._next_commit, self._next_look)) <= then:
            self.now = event
            if event == self._next_end:
                self._end()
            elif event == self._next_commit:
                self._next_commit += COMMIT_SECONDS
                for partition in self._partitions:
                    partition.commit()
            else:
                self._next_look += WATCH_SECONDS
                self.look()
        self.now = then

    def look(self) -> None:
        told = self.backlog.ask()
        told([partition.standing() for partition in self._partitions], self.num_slots > 0, self.now)

    def resize(self, num_slots: int) -> None:
        """Engines come, or go, which leave what they began to those that come."""
        self.num_slots = num_slots
        self._begin()

    @property
    def _next_end(self) -> float:
        return self._running[0][0] if self._running else float("inf")

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self.num_slots:
            partition, offset, came_at, life = self._waiting.popleft()
            self._partitions[partition].begun = offset + 1
            ends_at = self.now + self._seconds()
            heapq.heappush(self._running, (ends_at, partition, offset, came_at, self.now, life))

    def _end(self) -> None:
        ended_at, partition, offset, came_at, begun_at, life = heapq.heappop(self._running)
        self._partitions[partition].done.add(offset)
        self.served.append(Served(came_at, begun_at, ended_at))
        life.close()
        self._begin()
