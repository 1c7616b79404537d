"""How many tokens of prompts the next step may compute, and how classes share them.

Prefill has what the time between two tokens leaves beside the decodes, and one block at least. Interactive sequences
come first, but for batch's share.
"""

from __future__ import annotations

from services.engine.copies import Copies
from services.engine.limits import Limits, share_of_batch
from services.engine.running import Running
from services.engine.sequence import Sequence


class PrefillBudget:
    """As things stand when it is asked."""

    def __init__(self, limits: Limits, copies: Copies, running: Running, *, block_size: int) -> None:
        self._limits = limits
        self._copies = copies
        self._running = running
        self._block_size = block_size

    def tokens(self, *, beside_decodes: bool) -> int:
        """How many the next step may compute, with the decodes or without them."""
        most = self._limits.max_step_tokens
        decoding = (
            [s for s in self._running if s.num_remaining == 1 and not s.has_all_planned] if beside_decodes else []
        )
        if not decoding:
            return most
        kv_tokens = sum(sequence.num_planned + 1 for sequence in decoding)
        within = self._copies.pace.tokens_within(self._limits.itl_target, kv_tokens=kv_tokens)
        return int(min(most - len(decoding), max(within - len(decoding), self._block_size)))

    def shares(self, budget: int) -> dict[bool, int]:
        """By `interactive`, how so many tokens are shared by those that run: interactive ones come first, and leave
        batch ones their share where they want it."""
        wanted_by_batch = self._running.num_prefill_tokens()[False]
        return {True: budget - (share_of_batch(budget) if wanted_by_batch else 0), False: budget}

    def left_for(self, newcomer: Sequence, budget: int, wanted: dict[bool, int]) -> int:
        """How many of so many tokens there are for one that is not admitted yet, where those that run want `wanted`, by
        `interactive`. Those of batch ones are in nobody's way but their own; and where interactive ones fill the step
        batch ones have their share."""
        left = budget - wanted[True]
        return left if newcomer.interactive else max(left, share_of_batch(budget)) - wanted[False]
