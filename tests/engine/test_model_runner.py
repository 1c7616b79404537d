"""Steps, from the scheduler's decision to tokens: with chosen logits, and with a real model."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from services.engine.batch import Step, Work
from services.engine.blocks import BlockPool
from services.engine.build import build
from services.engine.kv_cache import KVCache, KVShape
from services.engine.model_runner import Eager, ModelRunner
from services.engine.sampler import TorchSampler
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import FinishReason, SamplingParams, Sequence, StopRules, TokenLogprobs
from services.engine.settings import EngineSettings
from services.engine.shard import ALONE, Shard
from services.engine.state import Batch, DeviceState
from tests.engine.slots import BLOCK_SIZE, sequence
from tests.engine.test_state import admitting

VOCABULARY = 64
BROKEN = 13


class Successor:
    """A model whose likeliest token is the one after the last; after `BROKEN` its logits are no numbers."""

    kv_shape = KVShape(layers=1, kv_heads=1, head_dim=1, dtype=torch.float32)
    vocab_size = VOCABULARY
    max_positions = 512

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        last_R = batch.token_ids_N[batch.sample_rows_R]
        logits_RV = torch.zeros((len(last_R), VOCABULARY)).scatter_(1, (last_R + 1)[:, None] % VOCABULARY, 5.0)
        return logits_RV.masked_fill_((last_R == BROKEN)[:, None], torch.nan)


def runner() -> ModelRunner:
    model = Successor()
    state = DeviceState(num_slots=4, max_len=128, block_size=BLOCK_SIZE)
    cache = KVCache(model.kv_shape, num_blocks=8, block_size=BLOCK_SIZE)
    return ModelRunner(Eager(model, cache, state, TorchSampler(state)))


def test_steps_may_be_launched_before_the_last_one_is_collected() -> None:
    """A decode finds the token that the step before sampled, unseen by the host."""
    under_test, each = runner(), sequence([4, 5])
    first = under_test.launch(admitting(each, count=2))
    second = under_test.launch(Step(2, (Work(0, 2, 1, True),)))
    third = under_test.launch(Step(3, (Work(0, 3, 1, True),)))
    assert [under_test.collect(launched).token_ids for launched in (first, second, third)] == [(6,), (7,), (8,)]


def test_a_step_without_rows_to_sample_gives_no_tokens() -> None:
    """A chunk in the middle of a prompt has a result too."""
    under_test, each = runner(), sequence([4, 5, 6])
    step = admitting(each, count=2)
    step = Step(1, (Work(0, 0, 2, False),), step.admitted, step.grown)
    result = under_test.collect(under_test.launch(step))
    assert (result.step, result.token_ids, result.logprobs, result.failed) == (step, (), (), frozenset())


def test_each_row_reports_as_many_logprobs_as_it_asked_for() -> None:
    """And none where it did not ask."""
    under_test = runner()
    rows = [sequence([4], logprobs=2), sequence([5]), sequence([6], logprobs=0)]
    steps = [admitting(each, slot=slot) for slot, each in enumerate(rows)]
    step = Step(
        1,
        tuple(work for each in steps for work in each.works),
        tuple(admission for each in steps for admission in each.admitted),
        tuple(growth for each in steps for growth in each.grown),
    )
    result = under_test.collect(under_test.launch(step))
    expected = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor([0]), 5.0).log_softmax(-1).tolist()
    first, second, third = result.logprobs
    assert isinstance(first, TokenLogprobs)
    assert first.logprob == pytest.approx(expected[0])
    assert first.top[0][0] == 5
    assert [logprob for _, logprob in first.top] == pytest.approx(expected[:2])
    assert second is None
    assert third == TokenLogprobs(first.logprob)


def test_a_row_without_numbers_fails_alone() -> None:
    """Its index is reported; the others' tokens stand."""
    under_test = runner()
    rows = [sequence([4]), sequence([BROKEN]), sequence([6])]
    steps = [admitting(each, slot=slot) for slot, each in enumerate(rows)]
    works = tuple(work for each in steps for work in each.works)
    admitted = tuple(admission for each in steps for admission in each.admitted)
    result = under_test.collect(under_test.launch(Step(1, works, admitted, tuple(each.grown[0] for each in steps))))
    assert result.failed == {1}
    assert (result.token_ids[0], result.token_ids[2]) == (5, 7)


class Engine:
    """Scheduler and runner of a real model, its blocks handed out in a shuffled order."""

    def __init__(
        self, folder: Path, *, lookahead: int = 0, num_blocks: int = 64, max_step_tokens: int = 64,
        max_sequences: int = 8, prefix_cache: bool = True, shard: Shard = ALONE, **settings: object,
    ) -> None:  # fmt: skip
        given = {"device": "cpu", "dtype": "float32", "block_size": 16, "threads": 1, **settings}
        given |= {"tensor_parallel": shard.count, "max_step_tokens": max_step_tokens}
        computer = build(
            EngineSettings(cache_blocks=num_blocks, max_sequences=max_sequences, **given),  # type: ignore[arg-type]
            folder,
            shard,
        )
        pool = BlockPool(num_blocks, block_size=16, keeps_prefixes=prefix_cache)
        blocks = pool.allocate(num_blocks)
        random.Random(1).shuffle(blocks)
        pool.release(blocks)
        limits = Limits(max_sequences=max_sequences, max_step_tokens=max_step_tokens, lookahead=lookahead)
        self.scheduler = Scheduler(pool, limits)
        self.model, self.cache, self.runner = computer.model, computer.cache, computer.runner
        self.shapes: set[tuple[int, int]] = set()
        """(decodes, prefill chunks) of the steps that ran."""

    def run(self, *sequences: Sequence) -> list[list[int]]:
        """The outputs of sequences that are all there from the start."""
        for each in sequences:
            self.scheduler.add(each)
        in_flight = deque()
        while True:
            while len(in_flight) <= self.scheduler.limits.lookahead and (step := self.scheduler.plan(0.0)):
                self.shapes.add((step.num_decodes, len(step.works) - step.num_decodes))
                in_flight.append(self.runner.launch(step))
            if not in_flight:
                return [each.output_ids for each in sequences]
            self.scheduler.commit(self.runner.collect(in_flight.popleft()), 0.0)


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path) -> Tokenizer:
    return Tokenizer.from_file(str(stories260k / "tokenizer.json"))


@pytest.fixture(scope="module")
def story(stories260k: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids of the published greedy text, from the beginning of sequence on."""
    text = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8").strip()
    ids = Engine(stories260k).run(greedy([1], 199))[0]
    assert tokenizer.decode([1, *ids]).strip() == text
    return [1, *ids]


def greedy(prompt_ids: list[int], max_tokens: int) -> Sequence:
    return Sequence("r", 0, prompt_ids, SamplingParams(temperature=0.0), StopRules(max_tokens))


def test_the_published_story_comes_out(story: list[int]) -> None:
    """Token by token from the beginning of sequence, over blocks that lie anywhere (the fixture compares the text)."""
    assert len(story) == 200


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("max_step_tokens", [8, 23, 64])
def test_the_story_goes_on_from_any_prompt_in_any_chunks(
    stories260k: Path, story: list[int], lookahead: int, max_step_tokens: int
) -> None:
    """Prompts of many lengths, computed in chunks beside one another's decodes, each continue the same story."""
    engine = Engine(stories260k, max_step_tokens=max_step_tokens, lookahead=lookahead)
    prompts = [story[:count] for count in (1, 2, 15, 16, 17, 33, 100, 150)]
    outputs = engine.run(*[greedy(prompt, 200 - len(prompt)) for prompt in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        assert prompt + output == story
    assert any(decodes and chunks for decodes, chunks in engine.shapes)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_story_survives_preemption(stories260k: Path, story: list[int], prefix_cache: bool) -> None:
    """A cache too small for all throws sequences out, which then compute again what they had."""
    engine = Engine(stories260k, num_blocks=26, prefix_cache=prefix_cache, max_step_tokens=40)
    prompts = [story[:count] for count in (1, 20, 40, 60, 80)]
    outputs = engine.run(*[greedy(prompt, 200 - len(prompt)) for prompt in prompts])
    assert engine.scheduler.totals.num_preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert prompt + output == story


def test_the_story_goes_on_from_cached_blocks(stories260k: Path, story: list[int]) -> None:
    """A second sequence finds the blocks of the first, and says the same."""
    engine = Engine(stories260k)
    engine.run(greedy(story[:100], 100))
    second = greedy(story[:150], 50)
    assert story[:150] + engine.run(second)[0] == story
    assert second.num_cached == 144


def test_what_blocks_held_before_spoils_nothing(stories260k: Path, story: list[int]) -> None:
    """Though every block holds NaN until it is written, prompts of many lengths, decoded beside one another, each
    continue the same story."""
    engine = Engine(stories260k, num_blocks=104, max_step_tokens=40)
    engine.cache.data.fill_(255)  # NaN in every dtype
    prompts = [story[:count] for count in (1, 2, 15, 16, 17, 33, 100, 150)]
    outputs = engine.run(*[greedy(prompt, 200 - len(prompt)) for prompt in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        assert prompt + output == story


def test_a_sequence_without_numbers_spoils_no_other(
    stories260k: Path, story: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are NaN, chunk by chunk beside others that decode; they, and those that get its blocks after
    its end, say what they say without it."""
    engine, broken = Engine(stories260k, num_blocks=40, max_step_tokens=40, max_sequences=4), max(story) + 1
    embed = engine.model._embedding  # type: ignore[attr-defined]
    monkeypatch.setattr(
        engine.model,
        "_embedding",
        lambda token_ids_N: embed(token_ids_N).masked_fill_((token_ids_N == broken)[:, None], torch.nan),
    )
    others = [greedy(story[:count], 200 - count) for count in (1, 20, 60, 2, 40)]
    spoiled = [greedy([1] + [broken] * 99, 10) for _ in range(2)]
    engine.run(others[0], spoiled[0], *others[1:3], spoiled[1], *others[3:])
    assert [each.finish for each in spoiled] == [FinishReason.ERROR] * 2
    for each in others:
        assert [*each.prompt_ids, *each.output_ids] == story


def drawn(prompt_ids: list[int], max_tokens: int, *, seed: int, choice: int = 0) -> Sequence:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=seed, logprobs=1)
    return Sequence("r", choice, prompt_ids, params, StopRules(max_tokens))


def test_drawn_stories_are_the_same_in_company_and_after_a_preemption(stories260k: Path, story: list[int]) -> None:
    """Eight seeds together on a small cache say what each says alone, log-probabilities included; no two agree."""
    alone = [Engine(stories260k).run(drawn(story[:9], 60, seed=seed))[0] for seed in range(8)]
    engine = Engine(stories260k, num_blocks=16, lookahead=1)
    together = [drawn(story[:9], 60, seed=seed) for seed in range(8)]
    assert engine.run(*together) == alone
    assert engine.scheduler.totals.num_preemptions > 0
    assert len({tuple(output) for output in alone}) == 8
    assert all(len(each.output_logprobs) == 60 for each in together)
    assert all(each.finish is FinishReason.LENGTH for each in together)


def test_a_sequence_may_fill_the_whole_context(stories260k: Path) -> None:
    """Up to the last position that the model has."""
    each = greedy([1] * 500, 12)
    assert len(Engine(stories260k, max_step_tokens=512).run(each)[0]) == 12


@dataclass(frozen=True)
class Told:
    """A story told with keys and values in 8 bits."""

    rules: str
    ids: list[int]
    certain: int
    """Up to here every token leads the next likeliest by more than e to 0.02. Behind it rounding may decide: sums of another
    order move a key by a rounding of float32, and now and then that by a rounding of 8 bits."""

    def check(self, each: Sequence) -> None:
        ids = [*each.prompt_ids, *each.output_ids]
        assert len(ids) == 200 and each.finish is FinishReason.LENGTH
        assert ids[: self.certain] == self.ids[: self.certain]


@pytest.fixture(scope="module", params=["fp8_e4m3", "int8", "0=auto,-1=int8,fp8_e4m3"])
def told(request: pytest.FixtureRequest, stories260k: Path) -> Told:
    each = Sequence("r", 0, [1], SamplingParams(temperature=0.0, logprobs=2), StopRules(199))
    ids = Engine(stories260k, kv_cache_dtype=request.param).run(each)[0]
    leads = [of.top[0][1] - of.top[1][1] for of in each.output_logprobs]
    return Told(request.param, [1, *ids], next((i + 1 for i, lead in enumerate(leads) if lead < 0.02), 200))


def test_in_8_bits_the_story_is_nearly_the_same(told: Told, stories260k: Path, story: list[int]) -> None:
    """Going on from the published text, the likeliest token is the published one nine times in ten; and a story told
    from nothing begins like it."""
    assert told.ids[:20] == story[:20]
    nexts = [greedy(story[:count], 1) for count in range(1, 200)]
    outputs = Engine(stories260k, kv_cache_dtype=told.rules).run(*nexts)
    assert sum(output[0] == story[count] for count, output in enumerate(outputs, start=1)) >= 180


@pytest.mark.parametrize(
    "how",
    [
        {"max_step_tokens": 8},
        {"max_step_tokens": 23, "lookahead": 1},
        {"num_blocks": 26, "max_step_tokens": 40},
        {"num_blocks": 26, "max_step_tokens": 40, "prefix_cache": False},
    ],
    ids=["in chunks", "ahead", "preempted", "without prefixes"],
)
def test_in_8_bits_a_story_is_the_same_however_it_is_computed(told: Told, stories260k: Path, how: Any) -> None:
    """In chunks, beside others, thrown out and computed again, in blocks full of NaN."""
    engine = Engine(stories260k, kv_cache_dtype=told.rules, **how)
    engine.cache.data.fill_(255)
    stories = [greedy(told.ids[:count], 200 - count) for count in (1, 2, 15, 16, 17, 33, 100, 150)]
    engine.run(*stories)
    for each in stories:
        told.check(each)


def test_in_8_bits_a_story_goes_on_from_cached_blocks(told: Told, stories260k: Path) -> None:
    """They hold what computing them again would give."""
    engine = Engine(stories260k, kv_cache_dtype=told.rules)
    engine.run(greedy(told.ids[:100], 100))
    second = greedy(told.ids[:150], 50)
    engine.run(second)
    told.check(second)
    assert second.num_cached == 144


def test_in_8_bits_a_sequence_without_numbers_fails_alone(
    told: Told, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN does not vanish in rounding, and stays with its sequence."""
    engine, broken = Engine(stories260k, kv_cache_dtype=told.rules, num_blocks=40, max_sequences=4), max(told.ids) + 1
    embed = engine.model._embedding  # type: ignore[attr-defined]
    monkeypatch.setattr(
        engine.model,
        "_embedding",
        lambda token_ids_N: embed(token_ids_N).masked_fill_((token_ids_N == broken)[:, None], torch.nan),
    )
    others = [greedy(told.ids[:count], 200 - count) for count in (1, 20, 60)]
    spoiled = greedy([1] + [broken] * 30 + [1] * 10, 10)
    engine.run(others[0], spoiled, *others[1:])
    assert spoiled.finish is FinishReason.ERROR
    for each in others:
        told.check(each)
