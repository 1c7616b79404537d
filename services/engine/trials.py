"""Suspects are begun one at a time: what an engine may have died of must not take others along that are as innocent as
they were the first time. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

S = TypeVar("S")


class Trials(Generic[S]):
    """The suspects that wait, and the one that is on trial: begun, and neither proven nor over."""

    def __init__(self, order: Callable[[S], Any]) -> None:
        """`order`: of two that wait the lesser is begun first."""
        self._order = order
        self._waiting: list[S] = []
        self.on_trial: S | None = None

    def add(self, suspect: S) -> None:
        self._waiting.append(suspect)

    def next(self) -> S | None:
        """The suspect that is to be begun now; None where there is none, or one is on trial."""
        if self.on_trial is not None or not self._waiting:
            return None
        self.on_trial = min(self._waiting, key=self._order)
        self._waiting.remove(self.on_trial)
        return self.on_trial

    def over(self, suspect: S) -> None:
        """It has got on, or ended, or is another engine's now. Does nothing where it is no suspect, or no longer one."""
        if self.on_trial is suspect:
            self.on_trial = None
        elif suspect in self._waiting:
            self._waiting.remove(suspect)
