"""Two ranks say what one says: every family, however it is split, and whatever the scheduler does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ConfigurationError
from services.engine.sequence import SamplingParams, Sequence, StopRules
from tests.engine.ranks.pair import Pair, pair
from tests.engine.test_model_runner import Engine
from tests.engine.test_models import NATIVE, PROMPT, saved

__all__ = ["saved"]  # a fixture

pytestmark = pytest.mark.usefixtures("quiet")

SPLIT = {
    **{name: NATIVE[name] for name in NATIVE if "rope" not in name},
    "llama one kv head": {"num_key_value_heads": 1},
    "llama own kv heads": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
"""What differs from the small model: with biases, tied heads of a vocabulary that cannot be halved, norms of heads, fewer
key-value heads than ranks, and experts of which one rank has more."""


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Pair]:
    with pair() as started:
        yield started


def sequence(prompt_ids: list[int], max_tokens: int, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    return Sequence("r", 0, prompt_ids, params, StopRules(max_tokens))


def alone(folder: Path, *sequences: Sequence, **settings: Any) -> list[Sequence]:
    Engine(folder, **settings).run(*sequences)
    return list(sequences)


def outputs(sequences: list[Sequence]) -> list[list[int]]:
    return [each.output_ids for each in sequences]


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_family_says_what_it_says_whole(
    name: str, two_ranks: Pair, saved: Callable[[str, dict[str, Any]], Path]
) -> None:
    """64 greedy tokens of two prompts."""
    folder = saved(name, SPLIT[name])
    prompts = [PROMPT[:10], PROMPT]
    halves = two_ranks.run(folder, *(sequence(prompt, 64) for prompt in prompts))
    assert outputs(halves) == outputs(alone(folder, *(sequence(prompt, 64) for prompt in prompts)))


def test_drawn_tokens_are_the_same_on_all_ranks(two_ranks: Pair, stories260k: Path) -> None:
    """With a temperature, a nucleus, penalties and log-probabilities: every rank draws what one alone would."""

    def drawn(seed: int) -> Sequence:
        return sequence([1], 40, temperature=1.0, top_p=0.9, seed=seed, logprobs=2, frequency_penalty=0.5)

    halves, whole = two_ranks.run(stories260k, drawn(3), drawn(4)), alone(stories260k, drawn(3), drawn(4))
    assert outputs(halves) == outputs(whole)
    assert halves[0].output_ids != halves[1].output_ids
    for ours, theirs in zip(halves[0].output_logprobs, whole[0].output_logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=1e-4)


def test_the_story_is_the_published_one(two_ranks: Pair, stories260k: Path) -> None:
    """In chunks, from cached blocks and after preemptions: what one rank says in peace."""
    (whole,) = alone(stories260k, sequence([1], 199))
    story = [1, *whole.output_ids]
    prompts = [story[:count] for count in (1, 40, 80, 80, 120)]
    tight: dict[str, Any] = {"num_blocks": 26, "max_step_tokens": 40}
    halves = two_ranks.run(stories260k, *(sequence(prompt, 200 - len(prompt)) for prompt in prompts), **tight)
    for prompt, half in zip(prompts, halves, strict=True):
        assert prompt + half.output_ids == story
    assert any(each.num_cached for each in halves)
    engine = Engine(stories260k, **tight)  # which plans the same steps
    engine.run(*(sequence(prompt, 200 - len(prompt)) for prompt in prompts))
    assert engine.scheduler.totals.num_preemptions > 0


def test_keys_and_values_in_8_bits_are_split_like_others(two_ranks: Pair, stories260k: Path) -> None:
    """Every head has scales of its own, so the parts are those of the whole."""
    settings = {"kv_cache_dtype": "0=auto,int8"}
    halves = two_ranks.run(stories260k, sequence([1], 64), **settings)
    assert outputs(halves) == outputs(alone(stories260k, sequence([1], 64), **settings))


@pytest.mark.parametrize("quantization", ["fp8", "*=int8", "*.down_proj=int8-weight,*=int4-g32"])
def test_weights_in_few_bits_are_split_like_others(quantization: str, two_ranks: Pair, stories260k: Path) -> None:
    """Parts of rows have scales of their own, which are no coarser: two ranks are as near to what is not quantized as
    one is, in the log-probability of the likeliest token after 63 beginnings of a story."""

    def beginnings() -> list[Sequence]:
        return [sequence([1, *whole.output_ids[:count]], 1, logprobs=1) for count in range(63)]

    def error(found: list[Sequence]) -> float:
        rows = zip(found, truth, strict=True)
        return sum(abs(ours.output_logprobs[0].logprob - true.output_logprobs[0].logprob) for ours, true in rows)

    (whole,) = alone(stories260k, sequence([1], 64))
    truth = alone(stories260k, *beginnings())
    halves = two_ranks.run(stories260k, *beginnings(), quantization=quantization)
    whole_error = error(alone(stories260k, *beginnings(), quantization=quantization))
    assert 0 < error(halves) < 1.2 * whole_error


def test_noise_is_the_same_model_on_two_ranks(two_ranks: Pair, saved: Callable[[str, dict[str, Any]], Path]) -> None:
    """load_format dummy: each rank has its part of the same matrices."""
    folder, dummy = saved("qwen3_moe", NATIVE["qwen3_moe"]), {"load_format": "dummy"}
    halves = two_ranks.run(folder, sequence(PROMPT, 20), **dummy)
    assert outputs(halves) == outputs(alone(folder, sequence(PROMPT, 20), **dummy))


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        (
            "llama three heads",
            {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
            "3 key-value heads cannot be shared evenly",
        ),
        ("llama odd mlp", {"intermediate_size": 47}, "47 features of the MLP cannot be shared evenly"),
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 1, "n_head": 4},
            "transformers computes this model, .* only LlamaForCausalLM",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    name: str, changes: dict[str, Any], why: str, two_ranks: Pair, saved: Callable[[str, dict[str, Any]], Path]
) -> None:
    """With the setting and the number that is in the way."""
    with pytest.raises(ConfigurationError, match=f"tensor_parallel is 2, but .*{why}"):
        two_ranks.run(saved(name, changes), sequence(PROMPT, 1))
