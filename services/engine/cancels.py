"""Cancellations, remembered for the requests that they are meant for: those may lie unread in the log, or come again."""

from __future__ import annotations

from collections import OrderedDict
from itertools import product

from holdfast import ids
from holdfast.records import accepted_at_of
from holdfast.v1 import generation_pb2 as pb

MAX_CANCELS = 65_536
"""Most that are remembered; the oldest are forgotten first. So many, as far as the log keeps them, are read when the
engine starts, before its first request: some 10 MiB, and as much again in memory."""


class Cancels:
    """The newest wishes of each kind. Some say which request they mean: no other that has the id, however late they come.
    Those that do not mean whatever request of the id was written before them."""

    def __init__(self) -> None:
        self._heard: OrderedDict[tuple[str, int | None, int | None], int] = OrderedDict()
        """When the log took them, in milliseconds since the epoch, by id, choice (None: all) and `accepted_at` (None:
        whichever)."""

    def hear(self, cancel: pb.Cancel, timestamp_ms: int) -> None:
        """Remembers a wish that the log took then."""
        key = cancel.request_id, cancel.choice if cancel.HasField("choice") else None, accepted_at_of(cancel)
        self._heard[key] = timestamp_ms
        self._heard.move_to_end(key)
        if len(self._heard) > MAX_CANCELS:
            self._heard.popitem(last=False)

    def mean(self, request_id: str, choice: int | None, *, accepted_at: int | None, written_ms: int) -> bool:
        """Whether one of them ends a choice of a request, or (None) all of it. `written_ms`: when the log took its record."""
        for called, each in product({request_id, ids.of_client(request_id)}, {choice, None}):
            if accepted_at is not None and (called, each, accepted_at) in self._heard:
                return True
            if self._heard.get((called, each, None), -1) >= written_ms:
                return True
        return False
