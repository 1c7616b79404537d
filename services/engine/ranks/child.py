"""The first thing that a rank's process does: it ties its life to the front's, before anything is imported that takes long."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection

from services.engine.ranks.ring import Ring

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


@dataclass(frozen=True, slots=True)
class Links:
    """What a rank has in common with the front."""

    orders: Ring
    """To all ranks."""
    results: Ring
    """From the first rank."""
    parts: Ring
    """Of blocks, from this one."""
    reports: Connection
    """From this one: that it is ready, and why it ends."""
    port: int
    """Where the ranks meet."""


def run(which: bytes, links: Links, *, service: str, log_level: str) -> None:
    """The target of a rank's process. `which`: its shard, the settings and the model's folder, pickled, as to unpickle
    them imports torch."""
    _end_with_the_front()
    from services.engine.ranks import rank

    shard, settings, folder = pickle.loads(which)
    rank.run(shard, settings, folder, links, service=service, log_level=log_level)


def _end_with_the_front() -> None:
    """From now on the kernel kills this process when the front's thread that started it ends, whatever either does then:
    also where this one is stopped, or waits for a device or another rank."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    front = multiprocessing.parent_process()
    assert front is not None
    if os.getppid() != front.pid:  # it ended before that
        os._exit(1)
