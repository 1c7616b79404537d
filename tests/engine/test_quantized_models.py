"""Models whose matrices are kept in fp8."""

from __future__ import annotations

from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.models import load
from tests.engine.batches import Bench

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
PROMPT = [(7 * n * n + 3) % 97 for n in range(50)]


def folder_of(folder: Path, family: str) -> Path:
    transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family]).save_pretrained(folder)
    return folder


def logits(folder: Path, quantization: str, **more: Any) -> Tensor:
    model = load(folder, load_format="dummy", quantization=quantization, **more)
    return Bench(model).logits(PROMPT)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_model_to_a_few_percent(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each matrix is off by about 4 % of its products, which add up over layers as noise does: 3 to 6 % of these toys' logits,
    and a little more with the head."""
    folder = folder_of(tmp_path, family)
    expected = logits(folder, "none", dtype=dtype)
    body, whole = (logits(folder, text, dtype=dtype) for text in ("fp8", "lm_head=fp8,fp8"))
    assert 0.01 < relative_error(body, expected) < 0.08
    assert relative_error(body, expected) < relative_error(whole, expected) < 0.1


def test_a_layer_that_a_rule_spares_is_as_it_was(tmp_path: Path) -> None:
    """Sparing all of them changes nothing, sparing one less than sparing none."""
    folder = folder_of(tmp_path, "qwen3")
    expected = logits(folder, "none")
    assert torch.equal(logits(folder, "model.layers.*=none,lm_head=none"), expected)
    most = logits(folder, "model.layers.[01].*=none,fp8")
    assert 0 < relative_error(most, expected) < relative_error(logits(folder, "fp8"), expected)


@pytest.mark.parametrize(
    ("family", "quantization", "message"),
    [
        ("qwen3", "*.k_proj=none,fp8", r"layers\.\d\.self_attn\.q_proj.*k_proj.*kept as one matrix"),
        ("qwen3", "*.gate_up_proj=fp8", r"'\*\.gate_up_proj=fp8' decides about no matrix.*model\.layers\.\*\.mlp\.gate_proj"),
        ("qwen3", "fp4", "'fp4' is no rule; it must be one of none, fp8"),
        ("qwen3_moe", "*=fp8", r"experts\.0\.gate_proj cannot be quantized: experts are multiplied in stacks"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_the_model_are_refused(
    family: str, quantization: str, message: str, tmp_path: Path
) -> None:
    """With the names that there are."""
    with pytest.raises(ConfigurationError, match=message):
        logits(folder_of(tmp_path, family), quantization)


def test_what_transformers_computes_cannot_be_quantized(tmp_path: Path) -> None:
    """Its matrices are not ours."""
    with pytest.raises(ConfigurationError, match="quantization is fp8, but what transformers computes cannot be"):
        logits(folder_of(tmp_path, "llama"), "fp8", implementation="transformers")


def test_the_trained_checkpoint_still_tells_a_story(stories260k: Path) -> None:
    """Over the published text nine tokens in ten are still the likeliest, and the distributions are close; of its own accord
    it begins as published."""
    published = (stories260k / "expected_greedy_200.txt").read_text().strip()
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    ids = [1, *tokenizer.encode(published, add_special_tokens=False).ids]
    truth, found = (Bench(load(stories260k, quantization=text)).logits(ids) for text in ("none", "fp8"))
    assert (truth.argmax(-1) == found.argmax(-1)).float().mean() > 0.9
    before, after = truth.log_softmax(-1), found.log_softmax(-1)
    assert (before.exp() * (before - after)).sum(-1).mean() < 0.02
    text = tokenizer.decode([1, *Bench(load(stories260k, quantization="fp8")).greedy([1], 30)[0]]).strip()
    assert len(commonprefix([text, published])) > 30


def test_chunks_and_mates_change_as_little_as_they_do_without(stories260k: Path) -> None:
    """A row is rounded by itself. What else may differ is the order of a sum; where that tips a value over to the next step
    of eight bits the difference is seen, and most are not tipped."""
    bench = Bench(load(stories260k, quantization="fp8"))
    ids = [1, *((7 * n * n + 3) % 500 for n in range(90))]
    once, pieces = bench.logits(ids), bench.logits(ids, chunks=[17, 1, 40, 1, 1, 31])
    assert (once - pieces).abs().median() < 1e-4
    assert relative_error(pieces, once) < 0.02
    assert (once.argmax(-1) == pieces.argmax(-1)).float().mean() > 0.95
