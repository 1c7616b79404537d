"""What a step may be at most, and what of it batch sequences have while interactive ones want all."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.economy import Economy


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may be."""

    max_sequences: int
    """Slots."""
    max_step_tokens: int
    """Most tokens in a step; at least one for each slot."""
    lookahead: int = 0
    """How many steps may be planned before the result of the oldest is committed, that one apart."""
    itl_target: float = 0.2
    """Seconds between two tokens that prefill should leave to running sequences. Infinite: decodes wait while prompts fill the step, which is
    most tokens a second. Beside a step full of prompts the products of a decode cost as much as those of a prompt's token, and once all
    prompts are computed next to nothing."""
    economy: Economy | None = None
    """When steps are computed with the smaller copy of the weights; None where there is none."""

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_sequences:
            raise ValueError(
                f"max_step_tokens must be at least max_sequences ({self.max_sequences}), not {self.max_step_tokens}"
            )

    @property
    def batch_share(self) -> int:
        """Slots that batch sequences hold against interactive ones."""
        return share_of_batch(self.max_sequences)

    @property
    def decodes_may_wait(self) -> bool:
        """Whether decodes wait while prompts fill the step."""
        return self.itl_target == float("inf")


def share_of_batch(number: int) -> int:
    """What batch sequences have of so many slots or tokens: a tenth, rounded up, but never all."""
    return -(-number // 10) if number > 1 else 0
