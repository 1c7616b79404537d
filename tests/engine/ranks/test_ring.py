"""Messages through shared memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from services.engine.ranks.ring import Reader, Ring, Writer

CAPACITY = 1000


class Gone(Exception):
    """The other side is."""


@contextmanager
def ring(num_readers: int) -> Iterator[Ring]:
    made = Ring(num_readers, capacity=CAPACITY)
    yield made
    made.close()


def test_every_reader_gets_every_message_in_order() -> None:
    """Round and round: empty ones, some that just fit, and some of many times the memory; readers may be slow."""
    some = random.Random(0)
    messages = [some.randbytes(some.choice([0, 1, 7, 100, CAPACITY - 8, CAPACITY, 5 * CAPACITY])) for _ in range(200)]
    with ring(3) as made, ThreadPoolExecutor(3) as threads:
        readers = [Reader(made, index) for index in range(3)]
        reading = [threads.submit(lambda reader: [reader.receive() for _ in messages], each) for each in readers]
        writer = Writer(made)
        for message in messages:
            writer.send(message)
        assert all(each.result(timeout=30) == messages for each in reading)
        assert not any(reader.has_message for reader in readers)


def test_a_reader_sees_whether_there_is_a_message() -> None:
    """Those that came with one signal too."""
    with ring(1) as made:
        writer, reader = Writer(made), Reader(made, 0)
        assert not reader.has_message
        writer.send(b"one")
        writer.send(b"two")
        assert (reader.has_message, reader.receive(), reader.has_message, reader.receive()) == (
            True,
            b"one",
            True,
            b"two",
        )
        assert not reader.has_message


def test_a_writer_waits_for_the_slowest_reader() -> None:
    """And no longer than somebody may still make room."""
    with ring(2) as made:
        waited: list[int] = []

        def wait(fd: int) -> None:
            waited.append(fd)
            if not select.select([fd], [], [], 0)[0]:
                raise Gone

        writer, quick = Writer(made, wait=wait), Reader(made, 0, wait=wait)
        writer.send(bytes(600))
        assert len(quick.receive()) == 600
        with pytest.raises(Gone):
            quick.receive()
        with pytest.raises(Gone):
            writer.send(bytes(600))
        assert waited[-1] == made.taken[1]


def test_a_reader_waits_no_longer_than_somebody_may_write() -> None:
    """Also in the middle of a message."""
    with ring(1) as made:

        def wait(fd: int) -> None:
            if not select.select([fd], [], [], 0)[0]:
                raise Gone

        writer, reader = Writer(made, wait=wait), Reader(made, 0, wait=wait)
        with pytest.raises(Gone):
            reader.receive()
        with pytest.raises(Gone):
            writer.send(bytes(CAPACITY))
        with pytest.raises(Gone):
            reader.receive()


def test_a_ring_crosses_to_a_process_and_leaves_nothing() -> None:
    """Its reader gets what was written before it began; the memory has no name that could stay behind."""
    before = os.listdir("/proc/self/fd")
    spawn = multiprocessing.get_context("spawn")
    there, back = Ring(1, capacity=CAPACITY), Ring(1, capacity=CAPACITY)
    Writer(there).send(bytes(range(256)))
    process = spawn.Process(target=_echo, args=(there, back), daemon=True)
    process.start()
    reader = Reader(back, 0)
    assert reader.receive() == bytes(range(256))[::-1]
    process.join(30)
    assert process.exitcode == 0
    process.close()
    there.close()
    back.close()
    del reader
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1  # multiprocessing keeps one for its resource tracker


def _echo(there: Ring, back: Ring) -> None:
    Writer(back).send(Reader(there, 0).receive()[::-1])
