"""The deterministic mode of a CPU: every token is computed as if it were all that there is."""

from __future__ import annotations

from services.engine.batch import Step, Work
from services.engine.model_runner import Eager
from services.engine.sampler import Sampled, joined


class TokenByToken:
    """Computes a step as many steps of one token. What oneDNN and attention round differently with the number of rows, they
    cannot: there is one. Any model, any format, at the price of every gain of a batch."""

    def __init__(self, eager: Eager) -> None:
        self._eager = eager

    def run(self, step: Step) -> Sampled | None:
        """What the step sampled; None where none of its works does."""
        found = [self._eager.run(part) for part in _tokens_of(step)]
        return joined([sampled for sampled in found if sampled is not None])


def _tokens_of(step: Step) -> list[Step]:
    """A step for each token, the first of which brings all that changes in the slots."""
    works = [
        Work(work.slot, at, 1, work.samples and at == work.end - 1)
        for work in step.works
        for at in range(work.start, work.end)
    ]
    first = Step(step.number, (works[0],), step.admitted, step.grown, step.released)
    return [first, *(Step(step.number, (work,)) for work in works[1:])]
