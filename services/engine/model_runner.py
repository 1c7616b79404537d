"""Runs steps: from the scheduler's decision to what was sampled.

`launch` applies a step's delta to the slots, computes the batch and samples, and writes the sampled tokens to the slots,
where the next step finds them; the host need not have seen them. `collect` waits for what the host wants to know. So a
device that works by itself may be given the next step before the last one is collected; on a CPU `launch` does it all.

How a step is computed is an executor's business. `Eager` runs any step on any device, operation by operation; on a GPU
`Graphs` replays those that it has captured: decodes alone, and prefill beside them or not, up to `MOST_TOKENS` tokens or in
full steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from services.engine.batch import Step, StepResult
from services.engine.kv_cache import KVCache
from services.engine.models import Model
from services.engine.sampler import Reported, Sampled, Sampler
from services.engine.sequence import TokenLogprobs
from services.engine.state import DeviceState
from services.engine.transfers import on_host


class Executor(Protocol):
    """One way to compute any step."""

    def run(self, step: Step) -> Sampled | None:
        """What the step sampled; None where none of its works does."""
        ...


class Eager:
    """Computes a step operation by operation."""

    def __init__(self, model: Model, cache: KVCache, state: DeviceState, sampler: Sampler) -> None:
        self._model = model
        self._cache = cache
        self._state = state
        self._sampler = sampler

    def run(self, step: Step) -> Sampled | None:
        """What the step sampled; None where none of its works does."""
        batch = self._state.apply(step)
        logits_RV = self._model.forward(batch, self._cache)
        if not len(batch.selection):
            return None
        return self._sampler(logits_RV, batch.selection)


class TwoCopies:
    """Computes a step with one of two copies of the weights, over the same cache and slots (`economy`)."""

    def __init__(self, full: Executor, economical: Executor) -> None:
        self._full = full
        self._economical = economical

    def run(self, step: Step) -> Sampled | None:
        """What the step sampled; None where none of its works does."""
        return (self._economical if step.economical else self._full).run(step)


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    step: Step
    sampled: Sampled | None
    """In the host's memory once the copy is done."""
    copied: torch.Event | None
    """None where nothing had to be copied."""


class ModelRunner:
    """Computes steps in the order of their launches, for one thread."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Starts a step."""
        sampled = self._executor.run(step)
        if sampled is None or sampled.token_ids_R.device.type == "cpu":
            return Launched(step, sampled, None)
        sampled = _on_host(sampled)
        copied = torch.Event("cuda")
        copied.record()
        return Launched(step, sampled, copied)

    def collect(self, launched: Launched) -> StepResult:
        """Waits for a step and says what it sampled."""
        if launched.copied is not None:
            launched.copied.synchronize()
        if launched.sampled is None:
            return StepResult(launched.step, (), ())
        return _result(launched.step, launched.sampled)

    def stop(self) -> None:
        """Nothing: a step of this process ends by itself."""


def _on_host(sampled: Sampled) -> Sampled:
    """The same in pinned memory, as soon as the copies that this starts are done."""
    reported = sampled.reported
    return Sampled(
        token_ids_R=on_host(sampled.token_ids_R),
        peaks_R=on_host(sampled.peaks_R),
        reported=reported
        and Reported(
            counts=reported.counts,
            chosen_R=on_host(reported.chosen_R),
            top_RC=on_host(reported.top_RC),
            top_ids_RC=on_host(reported.top_ids_RC),
        ),
    )


def _result(step: Step, sampled: Sampled) -> StepResult:
    token_ids = tuple(sampled.token_ids_R.tolist())
    logprobs = _logprobs(sampled.reported) if sampled.reported is not None else (None,) * len(token_ids)
    failed = frozenset(row for row, peak in enumerate(sampled.peaks_R.tolist()) if not math.isfinite(peak))
    return StepResult(step, token_ids, logprobs, failed)


def _logprobs(reported: Reported) -> tuple[TokenLogprobs | None, ...]:
    """Of each row that wants them, with as many likeliest tokens as it wants."""
    columns = (reported.counts, reported.chosen_R.tolist(), reported.top_ids_RC.tolist(), reported.top_RC.tolist())
    return tuple(
        None if count is None else TokenLogprobs(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
        for count, chosen, ids, values in zip(*columns, strict=True)
    )
