"""How fast an answer came, as its reader saw it."""

from __future__ import annotations

import time
from collections.abc import Callable

from holdfast.events import Event, Tokens


class Stopwatch:
    """Runs from its making; is shown every event of one answer as it arrives."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._first: float | None = None
        self._last = self._start
        self._num_first = 0
        self.num_tokens = 0
        """Tokens that arrived."""

    def see(self, event: Event) -> None:
        """Takes the next event."""
        if not isinstance(event, Tokens):
            return
        self._last = self._clock()
        self.num_tokens += event.num_tokens
        if self._first is None:
            self._first = self._last
            self._num_first = event.num_tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None before it."""
        return None if self._first is None else self._first - self._start

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after those that came first; None where there are none."""
        if self._first is None or self._last == self._first:
            return None
        return (self.num_tokens - self._num_first) / (self._last - self._first)

    def __str__(self) -> str:
        parts = [f"{self.num_tokens} token{'s' * (self.num_tokens != 1)}"]
        if (first := self.time_to_first_token) is not None:
            parts.append(f"first after {first:.2f} s")
        if (rate := self.tokens_per_second) is not None:
            parts.append(f"then {rate:.1f} tokens/s")
        return ", ".join(parts)
