"""The front's side of the ranks: starts them, gives them steps, and says which one died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import structlog

from holdfast.errors import ConfigurationError, InternalError
from services.engine.batch import Step, StepResult
from services.engine.build import Facts
from services.engine.engine import running
from services.engine.ranks import child
from services.engine.ranks.messages import (
    Failed,
    Order,
    ReadBlock,
    Ready,
    Refused,
    Report,
    Stop,
    WriteBlock,
    packed,
    unpacked_result,
)
from services.engine.ranks.ring import Reader, Ring, Writer
from services.engine.settings import EngineSettings
from services.engine.shard import Shard, meeting_point

STOP_SECONDS = 5.0
"""How long all ranks together may take to do what they do and to end, once they should; then they are killed."""

DEATH_SECONDS = 5.0
"""How long a process may take to be gone once its pipe is."""

log = structlog.stdlib.get_logger(__name__)


@asynccontextmanager
async def started(settings: EngineSettings, folder: Path) -> AsyncIterator[RankGroup]:
    """The ranks that the settings ask for, each with its shard of the model loaded. They end with the block.

    Raises:
        ConfigurationError: the settings do not fit the model or the machine.
        InternalError: (also from the block) a rank failed or was killed.
    """
    with meeting_point() as port:
        group = RankGroup(settings, folder, port)
        try:
            await group.start()
            async with running(group.watch()):
                yield group
        finally:
            await asyncio.to_thread(group.close)


class RankGroup:
    """The ranks of one engine: a `Runner` for the step thread, and the `Cache` of its store. Once a rank is gone every
    call raises InternalError with its name."""

    facts: Facts
    """The same of every rank. Set once all are ready."""

    def __init__(self, settings: EngineSettings, folder: Path, port: int) -> None:
        self._settings, self._folder, self._port = settings, folder, port
        count = settings.tensor_parallel
        self._orders, self._results = Ring(count), Ring(1)
        self._parts = [Ring(1) for _ in range(count)]
        self._ranks: list[_Rank] = []
        self._order = Writer(self._orders, wait=self._wait)
        self._result = Reader(self._results, 0, wait=self._wait)
        self._part = [Reader(ring, 0, wait=self._wait) for ring in self._parts]
        self._ordering, self._reading, self._diagnosing = threading.Lock(), threading.Lock(), threading.Lock()
        self._is_ready = False
        self._stopping, self._deadline = os.eventfd(0), float("inf")
        self._error: InternalError | None = None

    async def start(self) -> None:
        """Starts the processes and waits until all are ready. They end with the thread that this is called in.

        Raises:
            ConfigurationError: a rank cannot start as configured.
            InternalError: it failed.
        """
        for number, parts in enumerate(self._parts):
            shard, rings = Shard(number, len(self._parts)), (self._orders, self._results, parts)
            self._ranks.append(_Rank(shard, self._settings, self._folder, rings, self._port))
        waiting = list(self._ranks)
        while waiting:
            await _readable(each.reports for each in waiting)
            for each in [each for each in waiting if each.reports.poll()]:
                match each.hear():
                    case Ready(facts):
                        self.facts = facts
                        waiting.remove(each)
                    case Refused(why):
                        raise ConfigurationError(why)
                    case _:
                        raise self._diagnosis()
        self._is_ready = True

    async def watch(self) -> None:
        """Raises InternalError when a rank ends, whether or not anybody waits for it."""
        await _readable(each.reports for each in self._ranks)
        raise self._diagnosis()

    def close(self) -> None:
        """Ends all ranks: in order if none failed, or else at once. Nothing of them is left."""
        self.stop()
        if self._is_ready and self._error is None:
            with contextlib.suppress(InternalError):
                self._send(Stop())
                for each in self._ranks:
                    each.await_end(self._seconds_left())
        self._error = self._error or InternalError("the ranks have ended")
        for each in self._ranks:
            each.kill()
        with self._reading, self._ordering:  # whoever still waits has heard of it
            for each in self._ranks:
                each.close()
            for ring in (self._orders, self._results, *self._parts):
                ring.close()
            os.close(self._stopping)

    # As a runner.

    def launch(self, step: Step) -> Step:
        """Hands the step to every rank."""
        self._send(step)
        return step

    def collect(self, launched: Step) -> StepResult:
        """Waits for the first rank."""
        return unpacked_result(self._result.receive(), launched)

    def stop(self) -> None:
        """From now on all calls together, those that wait already too, wait for the ranks no longer than STOP_SECONDS."""
        if self._deadline == float("inf"):
            self._deadline = time.monotonic() + STOP_SECONDS
            os.eventfd_write(self._stopping, 1)

    # As a cache: a block is the parts of all ranks, in their order.

    def read_block(self, block: int) -> bytes:
        """As `KVCache.read_block`, in any thread."""
        with self._reading:
            self._send(ReadBlock(block))
            return b"".join([part.receive() for part in self._part])

    def write_block(self, block: int, content: bytes) -> None:
        """As `KVCache.write_block`; the steps launched later find it so."""
        size = self.facts.layout.block_bytes * len(self._ranks)
        if len(content) != size:
            raise ValueError(f"a block of this cache has {size} bytes, not {len(content)}")
        self._send(WriteBlock(block, content))

    def _send(self, order: Order) -> None:
        with self._ordering:
            if self._error is not None:
                raise self._error
            self._order.send(packed(order))

    def _wait(self, fd: int) -> None:
        """Until the ranks have done something about it, or `stop` left no time for that."""
        awaited = [fd, *(each.reports.fileno() for each in self._ranks)]
        ready = _ready([*awaited, self._stopping])
        if self._stopping in ready:
            ready = _ready(awaited, seconds=self._seconds_left())
        if not ready:
            raise self._overdue()
        if ready != [fd]:
            raise self._diagnosis()

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _overdue(self) -> InternalError:
        with self._diagnosing:
            if self._error is None:
                self._error = InternalError(f"the ranks did not answer within {STOP_SECONDS:g} s of the engine's stop")
                log.warning("ranks are killed", why=str(self._error))
            return self._error

    def _diagnosis(self) -> InternalError:
        """Why the engine cannot go on: the rank that ended, or among several the one that no other's end explains."""
        with self._diagnosing:
            if self._error is None:
                ended = sorted(
                    (each for each in self._ranks if each.has_ended()), key=lambda each: isinstance(each.last, Failed)
                )
                self._error = InternalError(ended[0].obituary())
                last = ended[0].last
                more = {"exception": last.traceback} if isinstance(last, Failed) else {}
                log.error("a rank is gone", why=str(self._error), **more)
            return self._error


class _Rank:
    """A rank's process, and what it last said."""

    def __init__(
        self, shard: Shard, settings: EngineSettings, folder: Path, rings: tuple[Ring, Ring, Ring], port: int
    ) -> None:
        self._number = shard.rank
        self.last: Report | None = None
        self.reports, theirs = multiprocessing.Pipe(duplex=False)
        spawn = multiprocessing.get_context("spawn")  # a fork has the front's threads' locks, and no CUDA
        self.process: BaseProcess = spawn.Process(
            target=child.run,
            args=(pickle.dumps((shard, settings, folder)), child.Links(*rings, theirs, port)),
            kwargs={
                "service": structlog.contextvars.get_contextvars().get("service", "engine"),
                "log_level": logging.getLevelName(logging.getLogger().level).lower(),
            },
            name=f"holdfast-rank-{shard.rank}",
            daemon=True,
        )
        with theirs, _unheard_signals():
            self.process.start()

    def hear(self) -> Report | None:
        """What it says next, once its pipe can be read; None where it ended without a word."""
        try:
            self.last = self.reports.recv()
        except (EOFError, OSError):
            return None
        return self.last

    def has_ended(self) -> bool:
        """Whether it did, or said that it will."""
        return isinstance(self.last, Failed | Refused) or (self.reports.poll() and not isinstance(self.hear(), Ready))

    def obituary(self) -> str:
        """Who it was, and how it ended."""
        who = f"rank {self._number} (pid {self.process.pid})"
        if isinstance(self.last, Failed | Refused):
            return f"{who} failed: {self.last.why}"
        self.process.join(DEATH_SECONDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"{who} was killed by {signal.Signals(-code).name}"
        return f"{who} ended with exit code {code}"

    def await_end(self, seconds: float) -> None:
        """Returns when it has ended as it was told to, or after so many seconds."""
        self.process.join(seconds)
        if self.process.is_alive():
            log.warning("a rank is killed", why=f"rank {self._number} (pid {self.process.pid}) did not end as told")

    def kill(self) -> None:
        """Ends it where it still runs, and returns when it is gone."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Forgets it."""
        self.process.close()
        self.reports.close()


@contextmanager
def _unheard_signals() -> Iterator[None]:
    """Processes that are started here never hear of SIGINT and SIGTERM, which terminals and service managers send to all
    processes of a group: the front decides what they mean."""
    resource_tracker.ensure_running()  # or multiprocessing starts it now, and lifts the mask after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ready(fds: Iterable[int], *, seconds: float | None = None) -> list[int]:
    """Those that can be read, once there are any; none after so many seconds."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)]


async def _readable(connections: Iterable[Connection]) -> None:
    """Until one of them can be read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    fds = [connection.fileno() for connection in connections]
    for fd in fds:
        loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        for fd in fds:
            loop.remove_reader(fd)
