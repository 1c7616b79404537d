"""Models whose matrices are kept in few bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.quality.sizes import bytes_of
from services.engine.quant.matrix import nearest
from services.engine.quant.rules import FORMATS
from services.engine.weight_format import WeightFormat
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
        ("qwen3", "fp4", "'fp4' is no rule; it must be one of none, fp8, fp8-tensor"),
        ("qwen3_moe", "model.layers.*=fp8", r"experts\.0\.gate_proj cannot be quantized: experts are multiplied in stacks"),
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


def checkpoint(folder: Path, *, tied: bool, change: Callable[[Tensor], Tensor] = lambda weight: weight) -> Path:
    """A small Llama; `change`: of every matrix."""
    config = SMALL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (97, 64)} | ({} if tied else {"lm_head": (97, 64)})
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (64 if name in "qo" else 32, 64) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (96, 64) for name in ("gate", "up")} | {
            f"{prefix}.mlp.down_proj": (64, 96)
        }
    draw = torch.Generator().manual_seed(0)
    content = {f"{name}.weight": change(torch.randn(shape, generator=draw) * 0.03) for name, shape in shapes.items()}
    norms = [f"model.layers.{layer}.{name}_layernorm" for layer in range(3) for name in ("input", "post_attention")]
    content |= {f"{name}.weight": torch.ones(64) for name in (*norms, "model.norm")}
    save_file(content, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["int8-weight", "int4-g32", "int4-g32-asym"])
def test_logits_are_those_of_the_dequantized_weights(name: str, tied: bool, tmp_path: Path) -> None:
    """Of the whole model, embedding and head among them, computed without quantization."""
    scheme = FORMATS[WeightFormat(name)].scheme
    assert scheme is not None
    rounded = checkpoint(tmp_path / "rounded", tied=tied, change=lambda weight: nearest(weight, scheme).dequant())
    expected = Bench(load(rounded)).logits(PROMPT)
    plain = checkpoint(tmp_path / "plain", tied=tied)
    found = Bench(load(plain, quantization=f"*={name}")).logits(PROMPT)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert relative_error(Bench(load(plain)).logits(PROMPT), expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "most"), [("*=int8", 0.025), ("*=int8-weight", 0.02), ("fp8-tensor", 0.08), ("fp8-block", 0.08), ("*=int4-g32", 0.25)])  # fmt: skip
def test_logits_are_near_those_of_the_model(name: str, most: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """As near as the bits allow, and in 16 bits no further than their own roundings."""
    folder = checkpoint(tmp_path, tied=True)
    expected = Bench(load(folder)).logits(PROMPT)
    found = Bench(load(folder, dtype=dtype, quantization=name)).logits(PROMPT)
    own = relative_error(Bench(load(folder, dtype=dtype)).logits(PROMPT), expected)
    assert 0.001 < relative_error(found, expected) < most + 1.5 * own


def test_a_tied_table_is_kept_once(tmp_path: Path) -> None:
    """Unless a rule names the head with another format, or with none."""
    folder = checkpoint(tmp_path, tied=True)

    def size(rules: str) -> int:
        return bytes_of(load(folder, quantization=rules))

    small, table = size("*=int8"), 97 * 64
    assert size("model.embed_tokens=int8,model.layers.*=int8") == small
    assert size("lm_head=int4-g32,*=int8") >= small + table // 2
    assert size("lm_head=none,*=int8") == small + 4 * table


def test_static_scales_come_with_the_checkpoint(tmp_path: Path) -> None:
    """Beside the weight; without them the layer is named. As good as dynamic ones where they fit."""
    folder = checkpoint(tmp_path, tied=True)
    with pytest.raises(
        ConfigurationError, match=r"lacks the tensor model\.layers\.\d\.self_attn\.q_proj\.input_scale.*or say int8"
    ):
        load(folder, quantization="int8-static")
    content = load_file(folder / "model.safetensors")
    expected = Bench(load(folder)).logits(PROMPT)
    scales = {"o_proj": 0.01, "down_proj": 0.001}
    for name in [name for name in content if "_proj" in name]:
        scale = scales.get(name.split(".")[-2], 0.04)
        content[name.replace(".weight", ".input_scale")] = torch.tensor([scale])
    save_file(content, folder / "model.safetensors")
    error = relative_error(Bench(load(folder, quantization="int8-static")).logits(PROMPT), expected)
    assert 0.001 < error < 0.06


@pytest.mark.parametrize(("rules", "most"), [("*=int8", 0.27), ("*=int4-g64", 0.16), ("*=int4-g32-asym", 0.16)])
def test_weights_take_a_part_of_the_memory(rules: str, most: float, tmp_path: Path) -> None:
    """Of 32 bits a weight: two layers of SmolLM2, and of its vocabulary as much as belongs to two of thirty."""
    config = SMALL | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 49152 // 15,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = 2 * (576 * 960 + 576 * 576 + 3 * 576 * 1536) + 49152 // 15 * 576
    model = load(tmp_path, load_format="dummy", dtype=torch.bfloat16, quantization=rules)
    assert bytes_of(model) < most * 4 * weights
