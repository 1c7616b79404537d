"""Builds a model's layers side by side.

To read a layer's tensors is to wait for a disk, for pages to be mapped, and for a copy to a GPU; none of that needs
Python's lock. Threads of torch's own would only get in each other's way, so each of these has one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar, cast

import structlog
import torch

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

MOST_THREADS = 8
"""More do not read faster than a disk, and each holds a layer's tensors in the host's memory for a moment."""

PROGRESS_SECONDS = 5.0
"""How often a long load says how far it is."""


def build_layers(build: Callable[[int], T], count: int, *, device: torch.device | None = None) -> list[T]:
    """What `build` makes of 0 to count - 1, in this order. What it raises is raised, and layers that are not begun by then
    are left. `device`: which of several GPUs is meant where none is named."""
    has_failed = threading.Event()

    def build_one(index: int) -> T | None:
        if has_failed.is_set():
            return None
        try:
            return build(index)
        except BaseException:
            has_failed.set()
            raise

    threads = torch.get_num_threads()
    workers = min(MOST_THREADS, len(os.sched_getaffinity(0)), count)
    try:
        with ThreadPoolExecutor(workers, "load", initializer=_begin, initargs=(device,)) as pool:
            layers = [pool.submit(build_one, index) for index in range(count)]
            _tell_progress(layers)
        return [cast(T, layer.result()) for layer in layers]  # None beside one that raises alone
    finally:
        torch.set_num_threads(threads)  # which is the process's


def _begin(device: torch.device | None) -> None:
    """What each thread has for itself."""
    torch.set_num_threads(1)
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _tell_progress(layers: Sequence[Future[T]]) -> None:
    """Waits for all."""
    told = time.monotonic()
    for done, _ in enumerate(as_completed(layers), 1):
        if time.monotonic() - told > PROGRESS_SECONDS and done < len(layers):
            told = time.monotonic()
            log.info("loading", layers=f"{done} of {len(layers)}")
