"""When a step is computed with the smaller copy of the weights: some quality for some speed, where time is short.

An engine may hold its model twice, as it is served and once more in fewer bits (`EngineSettings.economy`). Which copy computes a
step is decided for the whole of it, since what costs time is that weights are read: the small one, if every sequence that takes part may have
it, and running ones get their tokens too slowly or waiting ones wait too long. Plain Python, no clock: seconds are given.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Economy:
    """Who may get less precise tokens, and when."""

    interactive: bool
    """Whether interactive sequences may."""
    batch: bool
    """Whether batch sequences may."""
    itl_target: float
    """Seconds between two tokens that running sequences should have."""
    wait_target: float
    """Seconds that the first one in line should wait for its first step."""

    def may(self, *, interactive: bool) -> bool:
        """Whether a sequence of this class may."""
        return self.interactive if interactive else self.batch

    def is_due(self, *, decode_seconds: float | None, waited: float, gain: float | None = None) -> bool:
        """Whether a target is in danger that the smaller copy would help to meet. `decode_seconds`: how long the full weights are expected to
        take for one token of each running sequence, None where that is not known yet; `waited`: by the first of those in line who
        may; `gain`: seconds by which the next step would end sooner, None where that is not known yet. What has to be widened may
        take longer than what has not, where rows are many."""
        if gain is not None and gain <= 0:
            return False
        return waited > self.wait_target or (decode_seconds is not None and decode_seconds > self.itl_target)
