"""Which copy of the weights computes a step, and how long each of them takes.

Where an engine holds its model twice (`economy`), the smaller copy computes a step while a target is in danger that it
would help to meet, if every sequence of the step may have it. Without a second copy the full weights compute all.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.engine.batch import Step
from services.engine.limits import Limits
from services.engine.pace import Pace
from services.engine.running import Running
from services.engine.sequence import Sequence
from services.engine.waiting import Waiting

_FULL_EACH = 8
"""Of so many steps one is computed by the full weights, whatever is in danger, once both copies' paces are known."""


class Copies:
    """The paces of both copies, learnt from the steps that were."""

    def __init__(self, limits: Limits, waiting: Waiting, running: Running) -> None:
        self.paces = {economical: Pace() for economical in (False, True)}
        """Of the steps of each copy of the weights."""
        self._limits = limits
        self._waiting = waiting
        self._running = running
        self._economical = False
        self._num_steps = 0

    @property
    def pace(self) -> Pace:
        """Of the copy that computed the newest step."""
        return self.paces[self._economical]

    def is_in_danger(self, now: float) -> bool:
        """Whether a target is, as things stand before the next step, and the smaller copy would help."""
        economy = self._limits.economy
        if economy is None:
            return False
        heads = [head for head in self._waiting.heads if self._may_save(head)]
        decoding = [each for each in self._running if each.num_remaining == 1]
        kv_tokens = sum(each.num_planned + 1 for each in decoding)
        starting = heads if len(self._running) < self._limits.max_sequences else []
        prefill = sum(self._running.num_prefill_tokens().values()) + sum(head.num_remaining for head in starting)
        tokens = min(len(decoding) + prefill, self._limits.max_step_tokens)
        gain = self._gain(tokens=tokens, kv_tokens=kv_tokens)
        if gain is not None and self._num_steps % _FULL_EACH == 0:
            # What the full weights take is learnt from steps like those that are left to the other copy.
            return False
        return economy.is_due(
            decode_seconds=self.paces[False].seconds(tokens=len(decoding), kv_tokens=kv_tokens),
            waited=max((now - head.arrival for head in heads), default=0.0),
            gain=gain,
        )

    def choose(self, sequences: Iterable[Sequence], *, in_danger: bool) -> bool:
        """Whether the smaller copy computes the next step, which is of these."""
        self._num_steps += 1
        self._economical = in_danger and all(map(self._may_save, sequences))
        return self._economical

    def learn(self, step: Step, seconds: float) -> None:
        """The step took so long, which the copy that computed it will take again."""
        self.paces[step.economical].observe(
            tokens=step.num_tokens,
            kv_tokens=sum(work.end for work in step.works),
            seconds=seconds,
            prefills=step.num_decodes < len(step.works),
        )

    def _gain(self, *, tokens: int, kv_tokens: int) -> float | None:
        """Seconds by which the smaller copy is expected to compute such a step sooner, None where that is not known yet."""
        full, small = (
            self.paces[economical].seconds(tokens=tokens, kv_tokens=kv_tokens) for economical in (False, True)
        )
        return None if full is None or small is None else full - small

    def _may_save(self, sequence: Sequence) -> bool:
        return self._limits.economy is not None and self._limits.economy.may(interactive=sequence.interactive)
