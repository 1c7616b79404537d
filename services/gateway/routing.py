"""Which partition of its topic a request is published to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.topics import REQUESTS
from holdfast.v1.generation_pb2 import RequestClass

_STRIDE = 19
"""From one turn to the next. An engine often owns neighbouring partitions, or every second one; steps of about 0.6 of
the number of partitions meet all engines in turns either way (multiplicative hashing, Knuth, TAOCP 3, 6.4)."""


class Routing:
    """Spreads requests over the partitions, and so over the engines that own them: to one with the fewest requests of
    this gateway that are still open, in turns where several have as few."""

    def __init__(self) -> None:
        self._open = {each: [0] * topic.num_partitions for each, topic in REQUESTS.items()}
        self._turn = dict.fromkeys(REQUESTS, 0)

    @contextmanager
    def partition(self, request_class: RequestClass.ValueType) -> Iterator[int]:
        """The partition for a request that is open as long as the block runs."""
        counts = self._open[request_class]
        turn = self._turn[request_class]
        back = pow(_STRIDE, -1, len(counts))
        chosen = min(range(len(counts)), key=lambda p: (counts[p], (p - turn) * back % len(counts)))
        self._turn[request_class] = (chosen + _STRIDE) % len(counts)
        counts[chosen] += 1
        try:
            yield chosen
        finally:
            counts[chosen] -= 1
