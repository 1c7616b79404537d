"""An engine that dies of one prompt, as a process dies in whose kernels something is wrong: `python -m tests.flow.mortal_engine`,
with the settings of an engine."""

from __future__ import annotations

import os
import signal

from services.engine.__main__ import main
from services.engine.batch import Step
from services.engine.model_runner import Launched, ModelRunner

POISON = (1, 333, 222, 111)

_launch = ModelRunner.launch


def launch(self: ModelRunner, step: Step) -> Launched:
    """Computes a step, or dies of it."""
    if any(tuple(each.token_ids[: len(POISON)]) == POISON for each in step.admitted):
        os.kill(os.getpid(), signal.SIGKILL)
    return _launch(self, step)


if __name__ == "__main__":
    ModelRunner.launch = launch  # type: ignore[method-assign]
    main()
