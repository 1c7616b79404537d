"""Messages through shared memory, from one process to several.

The memory is used round and round. A message is its length and its bytes; one that is longer than the room there is goes
in pieces, while the readers take them out. How many bytes came, and how many were taken, stands in no memory but in two
eventfds for each reader, which the kernel adds up: they wake whoever waits, nobody spins, and their system calls are what
orders the memory between two processors.

The memory has no name (a memfd): it is gone when the last process that has it is, however that ends, and no limit of
/dev/shm applies. A ring can be handed to a process of multiprocessing's spawn context.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from mmap import mmap
from multiprocessing.reduction import DupFd
from typing import Any

Wait = Callable[[int], None]
"""Returns when the file descriptor can be read; raises where whoever would see to that is gone."""

_LENGTH = 8
"""Bytes that say how long a message is."""


def wait_for(fd: int) -> None:
    """Waits for that alone."""
    _poll(fd, None)


class Ring:
    """The memory and its eventfds. Whoever makes it writes; readers get it when their process is started."""

    def __init__(self, num_readers: int, *, capacity: int = 1 << 22) -> None:
        memory = os.memfd_create("holdfast-ring")
        os.ftruncate(memory, capacity)
        self._take(capacity, [memory, *(os.eventfd(0) for _ in range(2 * num_readers))])

    def __getstate__(self) -> tuple[int, list[Any]]:
        return self.capacity, [DupFd(fd) for fd in self._fds]

    def __setstate__(self, state: tuple[int, list[Any]]) -> None:
        capacity, fds = state
        self._take(capacity, [fd.detach() for fd in fds])

    def _take(self, capacity: int, fds: list[int]) -> None:
        self.capacity = capacity
        self._fds = fds
        self.arrived, self.taken = fds[1::2], fds[2::2]
        """Of each reader: how many bytes came for it, and how many it took, since that was last asked."""

    def map(self) -> memoryview:
        """The memory, in this process."""
        return memoryview(mmap(self._fds[0], self.capacity))

    def close(self) -> None:
        """Gives up what this process has of it. Its writer and readers here are of no use any more."""
        for fd in self._fds:
            os.close(fd)


class Writer:
    """Sends messages to all readers of a ring; for one thread at a time."""

    def __init__(self, ring: Ring, *, wait: Wait = wait_for) -> None:
        self._ring = ring
        self._wait = wait
        self._data = ring.map()
        self._position = 0
        self._room = [ring.capacity] * len(ring.taken)
        """For each reader."""
        self._untold = 0

    def send(self, message: bytes | bytearray) -> None:
        """Returns once all of it is in the ring: where that is full, once the slowest reader made room. Raises what
        `wait` raises; no further message can be sent then."""
        self._put(memoryview(len(message).to_bytes(_LENGTH, "little")))
        self._put(memoryview(message))
        self._tell()

    def _put(self, piece: memoryview) -> None:
        while piece:
            offset = self._position % self._ring.capacity
            count = min(len(piece), self._ring.capacity - offset, *self._room)
            if not count:
                self._tell()
                self._make_room()
                continue
            self._data[offset : offset + count] = piece[:count]
            piece = piece[count:]
            self._position += count
            self._untold += count
            self._room = [room - count for room in self._room]

    def _tell(self) -> None:
        if self._untold:
            for fd in self._ring.arrived:
                os.eventfd_write(fd, self._untold)
            self._untold = 0

    def _make_room(self) -> None:
        slowest = self._room.index(0)
        fd = self._ring.taken[slowest]
        self._wait(fd)
        self._room[slowest] += os.eventfd_read(fd)


class Reader:
    """One of a ring's readers: gets every message, in order; for one thread at a time."""

    def __init__(self, ring: Ring, index: int, *, wait: Wait = wait_for) -> None:
        self._ring = ring
        self._arrived, self._taken = ring.arrived[index], ring.taken[index]
        self._wait = wait
        self._data = ring.map()
        self._position = 0
        self._here = 0
        """Bytes that came and were not taken."""
        self._untold = 0

    @property
    def has_message(self) -> bool:
        """Whether a message has begun to come."""
        return self._here > 0 or _poll(self._arrived, 0)

    def receive(self) -> bytearray:
        """The next message, once it is there. Raises what `wait` raises."""
        return self._take(int.from_bytes(self._take(_LENGTH), "little"))

    def _take(self, count: int) -> bytearray:
        message, done = bytearray(count), 0
        while done < count:
            if not self._here:
                self._tell()
                self._wait(self._arrived)
                self._here = os.eventfd_read(self._arrived)
            offset = self._position % self._ring.capacity
            size = min(count - done, self._here, self._ring.capacity - offset)
            message[done : done + size] = self._data[offset : offset + size]
            done += size
            self._position += size
            self._here -= size
            self._untold += size
        return message

    def _tell(self) -> None:
        """Before it waits: a writer that lacks room waits too."""
        if self._untold:
            os.eventfd_write(self._taken, self._untold)
            self._untold = 0


def _poll(fd: int, milliseconds: int | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))
