"""An engine with nothing around it: its step thread, given ids and giving ids. What a mesh is measured against."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.options import engine_here
from holdfast.errors import ConfigurationError
from services.engine.blocks import BlockPool
from services.engine.build import Computer, build_apart
from services.engine.engine import running
from services.engine.loop import Runner, StepLoop
from services.engine.metrics import EngineMetrics
from services.engine.model_runner import Launched
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import News, SamplingParams, Sequence, StopRules
from services.engine.settings import EngineSettings


@dataclass(slots=True, eq=False)
class Waiting:
    """An answer that is waited for."""

    last: asyncio.Future[float]
    """When its last token came."""
    first: float = 0.0
    """When its first token came; 0 before."""


class EngineAlone:
    """A running engine. Lives in the event loop, as the front of a real one does."""

    def __init__(self, settings: EngineSettings, computer: Computer, runner: Runner[Launched]) -> None:
        self.vocab_size = computer.model.vocab_size
        self.max_model_len = computer.facts.max_model_len
        self.device = computer.cache.data.device
        self.runner = runner
        capacity = settings.capacity(computer.facts.device)
        pool = BlockPool(
            computer.cache.num_blocks, block_size=capacity.block_size, keeps_prefixes=settings.prefix_cache
        )
        limits = Limits(
            max_sequences=capacity.max_sequences,
            max_step_tokens=capacity.max_step_tokens,
            lookahead=computer.facts.lookahead,
            itl_target=settings.itl_target_ms / 1000,
            economy=settings.economy_targets(),
        )
        metrics = EngineMetrics(CollectorRegistry())
        self.scheduler = Scheduler(pool, limits)
        """The step thread's: to be looked at there."""
        self.steps: StepLoop[Launched] = StepLoop(self.scheduler, runner, deliver=self._deliver, metrics=metrics)
        self._waiting: dict[Sequence, Waiting] = {}
        self._numbers = itertools.count()

    def require(self, num_tokens: int) -> None:
        """Raises ConfigurationError where a prompt and its answer, so many tokens together, do not fit."""
        if num_tokens > self.max_model_len:
            raise ConfigurationError(
                f"a prompt and its answer have {num_tokens:,} tokens here, and the engine takes {self.max_model_len:,}: ask for shorter "
                "ones, or take a model with a longer context or a larger cache"
            )

    async def first_and_last(self, prompt_ids: list[int], output_tokens: int) -> tuple[float, float]:
        """Computes so many tokens greedily, and returns when the first and the last of them came, in seconds. Raises
        ConfigurationError where they do not fit."""
        start = time.perf_counter()
        (waiting,) = self._begin([self._sequence(prompt_ids, output_tokens)])
        last = await waiting.last
        return waiting.first - start, last - start

    async def answers(self, prompts: Seq[list[int]], output_tokens: Seq[int]) -> list[list[int]]:
        """Computes so many tokens of each prompt greedily, all begun at once. Raises ConfigurationError where they do not fit."""
        sequences = [self._sequence(*each) for each in zip(prompts, output_tokens, strict=True)]
        await asyncio.gather(*[waiting.last for waiting in self._begin(sequences)])
        return [sequence.output_ids for sequence in sequences]

    async def end_of(self, sequence: Sequence, *, cancel_after: float | None = None) -> None:
        """Computes a sequence to its end, which is asked for after so many seconds where a number is given."""
        (waiting,) = self._begin([sequence])
        if cancel_after is not None:
            await asyncio.wait([waiting.last], timeout=cancel_after)
            self.steps.cancel([sequence])
        await waiting.last

    def _sequence(self, prompt_ids: list[int], output_tokens: int) -> Sequence:
        self.require(len(prompt_ids) + output_tokens)
        return Sequence(
            request_id=str(next(self._numbers)),
            choice=0,
            prompt_ids=prompt_ids,
            sampling=SamplingParams(temperature=0.0),
            stop=StopRules(max_tokens=output_tokens),
            arrival=time.time(),
        )

    def _begin(self, sequences: Seq[Sequence]) -> list[Waiting]:
        """Hands the sequences over."""
        loop = asyncio.get_running_loop()
        waiting = [Waiting(loop.create_future()) for _ in sequences]
        self._waiting.update(zip(sequences, waiting, strict=True))
        self.steps.add(sequences)
        return waiting

    def _deliver(self, news: list[News]) -> None:
        now = time.perf_counter()
        for each in news:
            waiting = self._waiting[each.sequence]
            waiting.first = waiting.first or now
            if each.finish is not None:
                del self._waiting[each.sequence]
                waiting.last.set_result(now)
        self.steps.told()


@asynccontextmanager
async def engine_alone(
    folder: Path,
    settings: Mapping[str, object],
    *,
    around: Callable[[Runner[Launched]], Runner[Launched]] = lambda runner: runner,
) -> AsyncIterator[EngineAlone]:
    """An engine for the model in a folder, in this process; `around` may put something between it and its runner. Where
    its step thread fails the block is cancelled, and an InternalError raised in a group. Raises
    ConfigurationError for settings that cannot be."""
    checked = engine_here(folder, settings)
    computer = await build_apart(checked, folder)
    engine = EngineAlone(checked, computer, around(computer.runner))
    async with engine.steps.running(), running(engine.steps.watch()):
        yield engine
