"""What becomes of open answers when their gateway stops: their readers go on elsewhere, and their requests run on."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.errors import Unavailable
from services.gateway.answer import Answer


class Moves(enum.Enum):
    """When a reader goes on elsewhere, if its gateway stops."""

    NEVER = "never"
    """It could not: it has no cursor. The answer ends with the gateway, and so does its request."""
    LATE = "late"
    """Once the time to drain is over: it may not know how to go on, and until then need not."""
    AT_ONCE = "at once"
    """It does so by itself, and nobody sees it. So the gateway need not wait, and one that starts again is back soon."""


class HandedOver(Unavailable):
    """The answer goes on elsewhere, from the last cursor that its reader has."""

    def __init__(self) -> None:
        super().__init__(
            "this gateway is being stopped; the stream goes on from its last cursor, at another one or in a moment",
            retry_after=0,
        )


class Handover:
    """The answers that could go on elsewhere, and when they do."""

    def __init__(self, *, possible: bool) -> None:
        """`possible`: whether cursors are good at other gateways, and at this one when it has started again."""
        self._possible = possible
        self._open: dict[Answer, Moves] = {}
        self._due: set[Moves] = set()

    @contextmanager
    def of(self, answer: Answer, moves: Moves) -> Iterator[None]:
        """While the block runs the answer is handed over when it is time, which breaks it with `HandedOver` and cancels
        nothing."""
        if not self._possible or moves is Moves.NEVER:
            yield
            return
        self._open[answer] = moves
        self._hand_over()  # it may have become time while the request was on its way to the log
        try:
            yield
        finally:
            del self._open[answer]

    def begin(self) -> None:
        """The gateway drains."""
        self._due.add(Moves.AT_ONCE)
        self._hand_over()

    def end(self) -> None:
        """It stops."""
        self._due.add(Moves.LATE)
        self._hand_over()

    def _hand_over(self) -> None:
        for answer, moves in self._open.items():
            if moves in self._due:
                answer.lose(HandedOver())
