"""What a training does, from its first step to its last."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Gradients = Literal["float32", "bfloat16", "powersgd"]
"""As what ranks exchange gradients: whole, rounded to 16 bits, or as products of thin matrices (Vogels et al. 2019, "PowerSGD")."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides what comes out. Two runs of one plan on one machine take the same steps, interrupted or not."""

    steps: int
    batch: int = 32
    """Windows in a step, over all ranks."""
    micro_batch: int = 0
    """Windows that a rank computes at a time; 0 for all of its share."""
    length: int = 512
    """Tokens in a window."""
    learning_rate: float = 3e-4
    """The highest, after the warm-up; it falls to a tenth of it by a cosine (Loshchilov and Hutter 2017, "SGDR")."""
    warmup: int = 100
    """Steps in which it rises from zero."""
    weight_decay: float = 0.1
    """Of matrices; vectors have none."""
    clip: float = 1.0
    """The longest gradient."""
    kl: float = 1.0
    """Weight of the divergence from the teacher, where there is one."""
    cross_entropy: float = 1.0
    """Weight of the text itself."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which the model is computed; parameters and their updates are float32."""
    gradients: Gradients = "bfloat16"
    held_out: float = 0.02
    """Share of the text that is never trained on, by whole files."""
    evaluate_every: int = 250
    """Steps from one look at the held-out text to the next."""
    save_every: int = 250
    """Steps from one point of return to the next."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "learning_rate", "clip", "evaluate_every", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above zero, not {getattr(self, name)}")
        for name in ("micro_batch", "warmup", "weight_decay", "kl", "cross_entropy"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below zero, and it is {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out is the share of the text that is not trained on: between 0 and 1, not {self.held_out}"
            )
        if self.kl == self.cross_entropy == 0:
            raise ValueError("kl and cross_entropy are both zero, so nothing would be learnt")

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, done))) / 2
