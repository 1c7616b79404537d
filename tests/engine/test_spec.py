"""What configs say, the real ones above all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.engine.layers.rotary import Llama3Scaling, YarnScaling
from services.engine.models.spec import ModelSpec, NotCovered, read_config

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 100,
}


def spec_of(architecture: str, **changes: Any) -> ModelSpec:
    return ModelSpec.from_config(BASE | {"architectures": [architecture]} | changes)


REAL: dict[str, dict[str, Any]] = {
    "Meta-Llama-3.1-8B": {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "qkv_bias": False,
        "tied": False,
        "max_positions": 131072,
        "windows": (None,) * 32,
    },
    "Mistral-7B-Instruct-v0.2": {"kv_heads": 8, "windows": (None,) * 32, "norm_eps": 1e-5},
    "Mixtral-8x7B-v0.1": {"layers": 32, "intermediate": 14336},
    "Qwen3-0.6B": {"head_dim": 128, "heads": 16, "qk_norm": True, "tied": True, "qkv_bias": False},
    "Qwen3-30B-A3B": {"head_dim": 128, "kv_heads": 4, "qk_norm": True, "windows": (None,) * 48},
    "Qwen3-32B": {"heads": 64, "kv_heads": 8, "hidden": 5120, "head_dim": 128},
    "qwen2.5-7b-instruct": {"qkv_bias": True, "o_bias": False, "head_dim": 128, "windows": (None,) * 28},
}


@pytest.mark.parametrize("name", REAL)
def test_the_vendors_configs_are_understood(name: str, shared: Path) -> None:
    """The real shapes come out of the real files."""
    spec = ModelSpec.from_config(read_config(shared / "data" / "configs" / name))
    assert {key: getattr(spec, key) for key in REAL[name]} == REAL[name]


def test_the_vendors_mixtures_and_ropes_are_understood(shared: Path) -> None:
    """Experts and scalings come out of the real files, too."""
    configs = shared / "data" / "configs"
    moe = ModelSpec.from_config(read_config(configs / "Qwen3-30B-A3B")).moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.intermediate, moe.normalize, len(moe.layers)) == (128, 8, 768, True, 48)
    moe = ModelSpec.from_config(read_config(configs / "Mixtral-8x7B-v0.1")).moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.intermediate, moe.normalize, len(moe.layers)) == (8, 2, 14336, True, 32)
    rotary = ModelSpec.from_config(read_config(configs / "Meta-Llama-3.1-8B")).rotary
    assert rotary.theta == 500000.0
    assert rotary.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "deepseek-v2-lite"])
def test_other_architectures_are_not_covered(name: str, shared: Path) -> None:
    """What the native decoder does not compute is left to transformers."""
    with pytest.raises(NotCovered, match="is not among"):
        ModelSpec.from_config(read_config(shared / "data" / "configs" / name))


def test_absent_keys_mean_what_the_family_means_by_them() -> None:
    """The defaults are those of transformers' config classes."""
    mistral = spec_of("MistralForCausalLM")
    assert (mistral.kv_heads, mistral.windows) == (8, (4096,) * 4)
    assert spec_of("MistralForCausalLM", sliding_window=None).windows == (None,) * 4
    assert spec_of("LlamaForCausalLM").kv_heads == 8
    assert spec_of("LlamaForCausalLM", sliding_window=9).windows == (None,) * 4
    assert spec_of("MixtralForCausalLM").rotary.theta == 1e6
    assert spec_of("Qwen3ForCausalLM").head_dim == 128


def test_qwens_windows_begin_late_or_where_layer_types_say() -> None:
    """`use_sliding_window` decides whether there are windows, `max_window_layers` or `layer_types` where."""
    asked = {"use_sliding_window": True, "sliding_window": 9}
    assert spec_of("Qwen2ForCausalLM", sliding_window=9, max_window_layers=1).windows == (None,) * 4
    assert spec_of("Qwen2ForCausalLM", **asked, max_window_layers=3).windows == (None, None, None, 9)
    types = ["sliding_attention", "full_attention"] * 2
    assert spec_of("Qwen3ForCausalLM", **asked, layer_types=types).windows == (9, None, 9, None)


def test_both_spellings_of_a_rope_are_read() -> None:
    """`rope_theta` with `rope_scaling` and `rope_parameters` say the same."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    older = spec_of("Qwen3ForCausalLM", rope_theta=1e6, rope_scaling=scaling)
    newer = spec_of("Qwen3ForCausalLM", rope_parameters={**scaling, "rope_type": "yarn", "rope_theta": 1e6})
    assert older.rotary == newer.rotary
    assert isinstance(older.rotary.scaling, YarnScaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'; natively there are default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_variants_that_are_not_computed_are_not_covered(changes: dict[str, Any], message: str) -> None:
    """A covered family with an option that the decoder lacks is named as such, never computed wrongly."""
    with pytest.raises(NotCovered, match=message):
        spec_of("LlamaForCausalLM", **changes)
