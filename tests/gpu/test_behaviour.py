"""What the engine does beside greedy answers, by graphs and with steps in flight: as on a CPU, in float32. Some 40 seconds."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from services.engine.sequence import FinishReason, SamplingParams, Sequence, StopRules
from tests.engine.test_model_runner import Engine, drawn, greedy

STORY = [1, 403, 407, 261, 378, 398, 285, 322, 421, 395, 426, 338, 266, 298, 270, 273, 413, 302, 260, 413, 270]
MARGIN = 0.15
"""Between the two likeliest tokens in float32, as log-probabilities: below it bfloat16 may choose the other. Logits of this
model reach 20, where bfloat16's steps are an eighth; those of the head are float32."""


def engine(folder: Path, device: str, **options: Any) -> Engine:
    return Engine(folder, **{"device": device, "lookahead": 2 if device == "cuda" else 1, **options})


def wishes() -> list[Sequence]:
    """One of every kind, three choices of one request among them."""
    params: list[tuple[dict[str, Any], StopRules]] = [
        ({"temperature": 0.0, "logprobs": 3}, StopRules(30)),
        ({"temperature": 0.8, "top_k": 20, "seed": 5}, StopRules(30)),
        ({"temperature": 1.0, "top_p": 0.9, "min_p": 0.02, "seed": 6, "logprobs": 0}, StopRules(30)),
        ({"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2}, StopRules(40)),
        ({"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4}, StopRules(40)),
        ({"temperature": 0.0, "logit_bias": ((7, 6.0), (403, -50.0)), "logprobs": 1}, StopRules(30)),
        ({"temperature": 0.0}, StopRules(60, min_tokens=25, stop_token_ids=frozenset({261, 270, 302, 413}))),
        ({"temperature": 0.0}, StopRules(60, stop_token_ids=frozenset({261, 270, 302, 413}))),
    ]
    each = [
        Sequence("r", 0, STORY[: 3 + 2 * number], SamplingParams(**wish), stop)
        for number, (wish, stop) in enumerate(params)
    ]
    choice = SamplingParams(temperature=1.0, seed=9)
    first = Sequence("n", 0, STORY, choice, StopRules(20))
    others = [Sequence("n", number, STORY, choice, StopRules(20), shares_prompt_with=first) for number in (1, 2)]
    return [*each, first, *others]


def check_alike(found: list[Sequence], expected: list[Sequence]) -> None:
    """The same tokens and ends; log-probabilities but for rounding."""
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.output_ids, mine.finish) == (theirs.output_ids, theirs.finish)
        assert len(mine.output_logprobs) == len(theirs.output_logprobs)
        for one, other in zip(mine.output_logprobs, theirs.output_logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=2e-3)


@pytest.mark.parametrize("lookahead", range(5))
def test_every_wish_is_served_as_on_a_cpu(stories260k: Path, device: str, lookahead: int) -> None:
    """Log-probabilities, penalties, bias, stops, seeds and choices, among one another and however many steps are in
    flight: the tokens that a CPU says, operation by operation and one after the other."""
    expected, found = wishes(), wishes()
    reference = Engine(stories260k, prefix_cache=False)
    for each in expected:
        reference.run(each)
    engine(stories260k, device, lookahead=lookahead).run(*found)
    check_alike(found, expected)
    ignoring, stopping = found[6:8]
    assert len(ignoring.output_ids) >= 25 > len(stopping.output_ids)
    assert len({tuple(each.output_ids) for each in found[8:]}) == 3


def test_prefixes_and_preemption_change_nothing(stories260k: Path, device: str) -> None:
    """A second sequence finds the blocks of the first; a crowd in a small cache is thrown out and computed again."""
    running = engine(stories260k, device, num_blocks=26, max_step_tokens=40)
    story = [1, *engine(stories260k, device).run(greedy([1], 199))[0]]
    prompts = [story[:count] for count in (1, 20, 40, 60, 80)]
    outputs = running.run(*[greedy(prompt, 200 - len(prompt)) for prompt in prompts])
    assert running.scheduler.totals.num_preemptions > 0
    assert [prompt + output for prompt, output in zip(prompts, outputs, strict=True)] == [story] * 5
    second = greedy(story[:150], 50)
    roomy = engine(stories260k, device)
    roomy.run(greedy(story[:100], 100))
    assert story[:150] + roomy.run(second)[0] == story
    assert second.num_cached == 144


def test_a_cancelled_sequence_leaves_the_others_alone(stories260k: Path, device: str) -> None:
    """In the middle of its answer, with steps in flight: it ends, and gives everything back."""
    running = engine(stories260k, device)
    sequences = [drawn(STORY[:9], 60, seed=seed) for seed in range(4)]
    expected = engine(stories260k, device).run(*(drawn(STORY[:9], 60, seed=seed) for seed in range(4)))
    for each in sequences:
        running.scheduler.add(each)
    in_flight: deque[Any] = deque()
    scheduler = running.scheduler
    while True:
        while len(in_flight) <= scheduler.limits.lookahead and (step := scheduler.plan(0.0)):
            in_flight.append(running.runner.launch(step))
        if not in_flight:
            break
        if len(sequences[1].output_ids) == 20:
            scheduler.cancel(sequences[1], FinishReason.CANCELLED, now=0.0)
        scheduler.commit(running.runner.collect(in_flight.popleft()), 0.0)
    assert sequences[1].finish is FinishReason.CANCELLED and sequences[1].output_ids == expected[1][:20]
    for index in (0, 2, 3):
        assert sequences[index].output_ids == expected[index]
    assert scheduler.num_held == scheduler.pool.num_active == 0


def test_captured_steps_say_what_operations_say(stories260k: Path, device: str) -> None:
    """Chunks beside decodes among them."""
    if device != "cuda":
        pytest.skip("nothing is captured on a CPU")
    from tests.engine.executors import captured, uncaptured  # needs Triton

    found, expected = wishes(), wishes()
    for alone, asked in ((captured, found), (uncaptured, expected)):
        running = engine(stories260k, device, max_step_tokens=23)
        running.runner = alone(running.runner)
        running.run(*asked)
        assert any(decodes and chunks for decodes, chunks in running.shapes)
    check_alike(found, expected)


def test_bfloat16_says_the_same_until_a_close_call(stories260k: Path, device: str) -> None:
    """Up to the first token whose lead in float32 is within what bfloat16 may be off."""
    sure = Sequence("r", 0, [1], SamplingParams(temperature=0.0, logprobs=2), StopRules(199))
    Engine(stories260k).run(sure)
    leads = [of.top[0][1] - of.top[1][1] for of in sure.output_logprobs]
    certain = next((index for index, lead in enumerate(leads) if lead < MARGIN), len(leads))
    assert certain >= 5
    (found,) = engine(stories260k, device, dtype="bfloat16").run(greedy([1], 199))
    assert found[:certain] == sure.output_ids[:certain]
