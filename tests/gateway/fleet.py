"""Engines without engines: what a log would tell of them, in a time of their own."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from holdfast.bus import Lag
from holdfast.committed import Committed
from holdfast.errors import Overloaded
from holdfast.v1.generation_pb2 import REQUEST_CLASS_INTERACTIVE
from services.gateway.backlog import Backlog, Entry
from services.gateway.routing import Routing
from services.gateway.turnover import Standing

COMMIT_SECONDS = 1.0
WATCH_SECONDS = 2.0
NUM_PARTITIONS = 4


@dataclass
class Partition:
    """One partition as engines see it."""

    engine: int
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
        return Standing.of(Lag(self.end, self.committed.position()), f"engine-{self.engine}")


@dataclass(frozen=True)
class Sent:
    """One request that was let in."""

    partition: Partition
    offset: int
    came_at: float
    entry: Entry
    life: ExitStack


@dataclass(frozen=True)
class Served:
    """One request that was answered."""

    came_at: float
    begun_at: float
    ended_at: float


class Fleet:
    """Engines with so many slots together behind a log, a gateway's backlog before it, and a clock that is moved by hand."""

    def __init__(self, backlog: Backlog, *, num_slots: int, seconds: Callable[[], float], num_engines: int = 1) -> None:
        """`seconds`: how long the next request takes."""
        self.backlog = backlog
        self.now = 0.0
        self.num_slots = num_slots
        self.served: list[Served] = []
        self.refused: list[tuple[float, Overloaded]] = []
        self._seconds = seconds
        self._partitions = [Partition(number % num_engines) for number in range(NUM_PARTITIONS)]
        self._waiting: list[deque[Sent]] = [deque() for _ in range(num_engines)]
        self._running: list[tuple[float, int, float, Sent]] = []
        self._hung: set[int] = set()
        self._routing = Routing(affinity_tokens=1)
        self._num_begun = 0
        self._next_commit, self._next_look = COMMIT_SECONDS, 0.0

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting))

    def num_waiting_at(self, engine: int) -> int:
        return len(self._waiting[engine])

    def send(
        self,
        *,
        followed: bool = True,
        time_left: float | None = None,
        partition: int | None = None,
        prompt: int | None = None,
    ) -> bool:
        """A request, let in or refused. `partition`: where it goes, whatever routing says. `prompt`: those with the same have
        affinity."""
        try:
            self.backlog.check(time_left)
        except Overloaded as error:
            self.refused.append((self.now, error))
            return False
        life = ExitStack()
        entry: Entry = life.enter_context(self.backlog.entering())
        if partition is None:
            prompt_ids = [] if prompt is None else [prompt]
            partition = self._routing.choose(
                REQUEST_CLASS_INTERACTIVE, prompt_ids, self.backlog.loads, self.backlog.full
            )
        self.backlog.goes_to(entry, partition)
        self.backlog.published(entry)
        if not followed:
            life.close()
        chosen = self._partitions[partition]
        self._waiting[chosen.engine].append(Sent(chosen, chosen.end, self.now, entry, life))
        chosen.end += 1
        self._begin()
        return True

    def hang(self, engine: int) -> None:
        """It says that it lives, and does nothing else."""
        self._hung.add(engine)
        self._running = [each for each in self._running if each[-1].partition.engine != engine]
        heapq.heapify(self._running)

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
        """Every engine has the same share of the slots."""
        num_running = Counter(sent.partition.engine for *_, sent in self._running)
        for engine, waiting in enumerate(self._waiting):
            while waiting and num_running[engine] < self.num_slots // len(self._waiting) and engine not in self._hung:
                sent = waiting.popleft()
                sent.partition.begun = sent.offset + 1
                num_running[engine] += 1
                self._num_begun += 1
                heapq.heappush(self._running, (self.now + self._seconds(), self._num_begun, self.now, sent))

    def _end(self) -> None:
        ended_at, _, begun_at, sent = heapq.heappop(self._running)
        sent.partition.done.add(sent.offset)
        self.served.append(Served(sent.came_at, begun_at, ended_at))
        self.backlog.answered(sent.entry)
        sent.life.close()
        self._begin()
