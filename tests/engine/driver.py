"""Drives a scheduler with the fake runner, as the loop does, and checks its accounts after every move."""

from __future__ import annotations

from collections import deque
from typing import Any

from services.engine.blocks import BlockPool
from services.engine.economy import Economy
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import FinishReason, Phase, SamplingParams, Sequence, StopRules
from tests.engine.fake_runner import EOS, FakeRunner, Launched, expected_output


def sequence(prompt_ids: list[int], *, max_tokens: int = 4, eos: bool = False, **fields: Any) -> Sequence:
    """A sequence of the fake model; `fields` are those of `Sequence`. `eos`: it may end by itself."""
    stop = StopRules(max_tokens, stop_token_ids=frozenset({EOS} if eos else ()))
    names = {"request_id": "r", "choice": 0, **fields}
    return Sequence(prompt_ids=prompt_ids, sampling=SamplingParams(), stop=stop, **names)


class Driver:
    """One engine without time: every move advances the clock by a second."""

    def __init__(self, *, num_blocks: int = 16, block_size: int = 4, max_sequences: int = 4, max_step_tokens: int = 16,
                 lookahead: int = 0, keeps_prefixes: bool = True, economy: Economy | None = None,
                 itl_target: float = 0.2) -> None:  # fmt: skip
        self.pool = BlockPool(num_blocks, block_size=block_size, keeps_prefixes=keeps_prefixes)
        limits = Limits(max_sequences, max_step_tokens, lookahead, itl_target, economy)
        self.scheduler = Scheduler(self.pool, limits)
        self.runner = FakeRunner(self.pool)
        self.in_flight: deque[Launched] = deque()
        self.now = 0.0
        self.all: list[Sequence] = []
        self.told: dict[Sequence, list[int]] = {}

    def add(self, each: Sequence, *, loading: bool = False) -> Sequence:
        self.all.append(each)
        self.scheduler.add(each, loading=loading)
        self._check()
        return each

    def cancel(self, each: Sequence, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self.scheduler.cancel(each, reason, now=self.now)
        self._check()

    def step(self) -> bool:
        """One turn of the loop: plans ahead, then commits the oldest step. False where there was nothing to do."""
        self.now += 1
        self.scheduler.expire(self.now)
        depth = self.scheduler.limits.lookahead + 1
        while len(self.in_flight) < depth and (step := self.scheduler.plan(self.now)):
            assert step.num_tokens <= self.scheduler.limits.max_step_tokens
            self.in_flight.append(self.runner.launch(step))
            self._check()
        if not self.in_flight:
            return False
        self._hear(self.scheduler.commit(self.runner.collect(self.in_flight.popleft()), self.now))
        self._check()
        return True

    def run(self, *, most_steps: int = 2000) -> None:
        """Until nothing is left to do."""
        for _ in range(most_steps):
            if not self.step():
                self._hear(self.scheduler.take_news())
                return
        raise AssertionError(f"{self.scheduler.num_held} sequences did not end in {most_steps} steps")

    def check_all_answered(self) -> None:
        """Everybody ended, was told all, and was told what a model alone in the world would have answered."""
        for each in self.all:
            assert each.is_finished
            assert self.told.get(each, []) == each.output_ids
            if each.finish in (FinishReason.STOP, FinishReason.LENGTH):
                assert each.output_ids == expected_output(each.prompt_ids, each.stop, each.choice)
            elif each.output_ids:
                expected = expected_output(each.prompt_ids, each.stop, each.choice)
                assert each.output_ids == expected[: len(each.output_ids)]
        assert self.scheduler.num_held == 0
        assert self.pool.num_active == 0

    def _hear(self, sequences: list[Sequence]) -> None:
        for each in sequences:
            news = each.tell()
            told = self.told.setdefault(each, [])
            assert news.first_index == len(told)
            told.extend(news.token_ids)

    def _check(self) -> None:
        pool = self.pool
        assert pool.num_free + pool.num_active + pool.num_cached == pool.num_blocks
        for launched in self.in_flight:
            assert all(pool.num_references(block) for block in launched.blocks), "freed while in flight"
        for each in self.all:
            assert (each.slot is not None) == (each.phase is Phase.RUNNING)
            assert bool(each.blocks) <= (each.phase is Phase.RUNNING)
            in_order = each.num_computed <= each.num_planned < each.num_known + each.num_pending
            assert in_order or each.is_finished
        slots = [each.slot for each in self.all if each.slot is not None]
        assert len(slots) == len(set(slots)) == self.scheduler.num_running <= self.scheduler.limits.max_sequences
