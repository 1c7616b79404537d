"""The deterministic mode on a CPU: in bfloat16 a token does not depend on what else is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.batch import Step
from services.engine.build import build
from services.engine.sampler import Sampled
from services.engine.sequence import SamplingParams, Sequence, StopRules
from services.engine.settings import EngineSettings
from tests.engine.test_model_runner import Engine

WIDE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
"""Wide enough that sums of another order round differently."""

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(75)]

WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 1 << 40, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": ((3, 2.0),)},
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a model whose weights are drawn."""
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    state = torch.random.get_rng_state()
    yield tmp_path
    torch.random.set_rng_state(state)


def asked(wish: dict[str, Any], prompt_ids: list[int] = PROMPT, max_tokens: int = 12) -> Sequence:
    """Logprobs tell more than tokens: a bit that changes in a logit changes them."""
    return Sequence("r", 0, prompt_ids, SamplingParams(**{"logprobs": 3, **wish}), StopRules(max_tokens))


def mates() -> list[Sequence]:
    """Of many lengths, some of whom begin like the prompt."""
    strangers = [[(11 * i + n) % 500 for i in range(5 + 9 * n)] for n in range(5)]
    return [asked(WISHES[n % 4], prompt, 10 + n) for n, prompt in enumerate([*strangers, PROMPT[:40], PROMPT[:64]])]


def engine(folder: Path, **settings: Any) -> Engine:
    given = {"dtype": "bfloat16", "load_format": "dummy", "deterministic": True, "max_model_len": 128, **settings}
    return Engine(folder, **given)


def told(each: Sequence) -> tuple[object, ...]:
    return each.output_ids, each.output_logprobs


def wishing() -> list[Sequence]:
    """A sequence for each wish, whose prompts have no beginning in common."""
    return [asked(wish, PROMPT[n:]) for n, wish in enumerate(WISHES)]


def alone(folder: Path, **settings: Any) -> list[tuple[object, ...]]:
    """What those that wish are told, each the only one of an engine."""
    sequences = wishing()
    for each in sequences:
        engine(folder, **settings).run(each)
    return [told(each) for each in sequences]


def company(folder: Path, **settings: Any) -> tuple[list[tuple[object, ...]], int]:
    """What they are told among others, and how often somebody was thrown out."""
    sequences, others, running = wishing(), mates(), engine(folder, **settings)
    running.run(*others[:3], *sequences, *others[3:])
    return [told(each) for each in sequences], running.scheduler.totals.num_preemptions


def test_company_chunks_and_preemption_change_no_bit(folder: Path) -> None:
    """Greedy, seeded and edited, beside others, in chunks of any size, ahead of the host, thrown out and computed again: the
    same tokens, and the same log-probabilities to the last bit."""
    expected = alone(folder)
    for how in ({}, {"max_step_tokens": 9}, {"max_step_tokens": 23, "lookahead": 1}):
        assert company(folder, **how)[0] == expected
    found, preemptions = company(folder, num_blocks=10, max_step_tokens=40)
    assert preemptions > 0
    assert found == expected


def test_a_cached_prefix_changes_no_bit(folder: Path) -> None:
    """Its keys and values are those that would be computed."""
    running, expected = engine(folder), alone(folder)[0]
    running.run(*mates())
    each = wishing()[0]
    running.run(each)
    assert each.num_cached == 64
    assert told(each) == expected


def test_in_8_bits_no_bit_changes_either(folder: Path) -> None:
    """Neither matrices in fp8 nor keys and values in int8 see what stands beside a token."""
    formats = {"quantization": "fp8", "kv_cache_dtype": "int8"}
    assert company(folder, **formats)[0] == alone(folder, **formats)


def test_the_ordinary_mode_rounds_by_company(folder: Path) -> None:
    """So the tests above can fail: without the mode, log-probabilities differ at least."""
    ordinary = {"deterministic": False}
    expected = alone(folder, **ordinary)
    ways: tuple[dict[str, Any], ...] = ({}, {"max_step_tokens": 9}, {"max_step_tokens": 23})
    assert any(company(folder, **ordinary, **how)[0] != expected for how in ways)


def test_every_token_is_a_step_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes in the slots comes with the first, and the last of a chunk alone samples."""
    running = engine(folder, max_step_tokens=40)
    eager = running.runner._executor._eager  # type: ignore[attr-defined]
    steps: list[Step] = []
    run = eager.run

    def noted(step: Step) -> Sampled | None:
        steps.append(step)
        sampled: Sampled | None = run(step)
        return sampled

    monkeypatch.setattr(eager, "run", noted)
    running.run(asked(WISHES[0], PROMPT[:5], 1))
    assert [[tuple(work) for work in step.works] for step in steps] == [[(0, at, 1, at == 4)] for at in range(5)]
    assert [len(step.admitted) for step in steps] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("setting", [{"quantization": "fp8"}, {"kv_cache_dtype": "int8"}])
def test_a_gpu_refuses_8_bits(folder: Path, setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, before anything is loaded."""
    monkeypatch.setattr("services.engine.build.device_of", lambda *_: torch.device("cuda"))
    with pytest.raises(ConfigurationError, match=f"deterministic: not with {next(iter(setting))}"):
        build(EngineSettings(deterministic=True, **setting), folder)  # type: ignore[arg-type]


def test_several_ranks_are_refused() -> None:
    """A sum over ranks is taken in an order that nobody promises."""
    from services.engine.shard import Shard

    with pytest.raises(ConfigurationError, match="deterministic: not with tensor_parallel 2"):
        build(EngineSettings(device="cpu", deterministic=True, tensor_parallel=2), Path(), Shard(0, 2))
