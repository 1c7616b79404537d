"""Which partition of its topic a request is published to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.topics import REQUESTS
from holdfast.v1.generation_pb2 import RequestClass


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
        chosen = min(range(len(counts)), key=lambda p: (counts[p], (p - turn) % len(counts)))
        self._turn[request_class] = (chosen + 1) % len(counts)
        counts[chosen] += 1
        try:
            yield chosen
        finally:
            counts[chosen] -= 1
