"""Reading weights, and refusing what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.models.spec import eos_token_ids
from services.engine.weights import Dummy, open_checkpoint
from tests.engine.batches import Bench

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def tensors(*, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of a Llama of that config, by the checkpoint's names."""
    shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def folder_of(folder: Path, content: dict[str, torch.Tensor] | None, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if content is not None:
        save_file(content, folder / "model.safetensors")
    return folder


def logits(folder: Path) -> torch.Tensor:
    return Bench(load(folder)).logits([1, 5, 9, 3])


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    """Nobody could say which of them is meant."""
    for name in ("a", "b"):
        save_file({"w": torch.zeros(2), name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"w": "a.safetensors", "a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with (
        pytest.raises(ConfigurationError, match=r"b\.safetensors holds tensors that another shard .* holds too: w"),
        open_checkpoint(tmp_path, dtype=torch.float32, device=torch.device("cpu")),
    ):
        pass


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    """A model in shards with an index computes what it computes from a single file."""
    content = tensors()
    expected = logits(folder_of(tmp_path, content))
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-0000{index % 3}-of-00003.safetensors" for index, name in enumerate(content)}
    for file in set(files.values()):
        save_file({name: content[name] for name in content if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(logits(tmp_path), expected)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """With tied embeddings the head's matrix may be absent, or there and ignored."""
    content = tensors()
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    expected = logits(folder_of(tmp_path, content))
    assert torch.equal(logits(folder_of(tmp_path, content, tie_word_embeddings=True)), expected)
    del content["lm_head.weight"]
    assert torch.equal(logits(folder_of(tmp_path, content, tie_word_embeddings=True)), expected)


def test_tensors_are_converted_to_the_dtype_asked_for(tmp_path: Path) -> None:
    """A bfloat16 checkpoint served in float32 computes with its values in float32."""
    content = tensors(dtype=torch.bfloat16)
    halves = load(folder_of(tmp_path, content, dtype="bfloat16"))
    assert halves.kv_shape.dtype is torch.bfloat16
    widened = Bench(load(tmp_path, dtype=torch.float32)).logits([1, 5, 9, 3])
    as_float = logits(folder_of(tmp_path, {name: tensor.float() for name, tensor in content.items()}))
    assert torch.equal(widened, as_float)


def test_older_checkpoints_may_carry_their_frequencies(tmp_path: Path) -> None:
    """Rotary frequencies, which the config implies, are no unexpected tensors."""
    content = tensors()
    expected = logits(folder_of(tmp_path, content))
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert torch.equal(logits(folder_of(tmp_path, content)), expected)


def test_what_a_folder_lacks_or_has_too_much_is_named(tmp_path: Path) -> None:
    """Missing, misshapen, quantized and unexpected tensors each get an error that names them."""
    name = "model.layers.1.self_attn.k_proj.weight"
    without = {key: value for key, value in tensors().items() if key != name}
    cases = {
        f"lacks the tensor {name}": without,
        r"has shape \[8, 16\], but the config makes it \[16, 16\]": without | {name: torch.ones(8, 16)},
        "holds int8, without scales that a quantization_config tells of": without
        | {name: torch.ones(16, 16, dtype=torch.int8)},
        "no place for: model.layers.2.extra": tensors() | {"model.layers.2.extra": torch.ones(1)},
        "no place for: lm_head.bias": tensors() | {"lm_head.bias": torch.ones(32)},
    }
    for message, content in cases.items():
        with pytest.raises(ConfigurationError, match=message):
            load(folder_of(tmp_path, content))


def test_a_misnamed_tensor_is_shown_beside_the_missing_one(tmp_path: Path) -> None:
    """The error of a missing tensor lists what the folder has in its place."""
    content = tensors()
    content["model.norm.gamma"] = content.pop("model.norm.weight")
    with pytest.raises(ConfigurationError, match=r"lacks the tensor model\.norm\.weight; it holds model\.norm\.gamma$"):
        load(folder_of(tmp_path, content))


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    """No file, a missing shard, a broken file and a broken index are told apart."""
    with pytest.raises(ConfigurationError, match=r"no model folder: it has no config\.json"):
        load(tmp_path)
    with pytest.raises(ConfigurationError, match=r"holds no weights: neither model\.safetensors nor .*dummy"):
        load(folder_of(tmp_path, None))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ConfigurationError, match=r"lacks the shards one\.safetensors"):
        load(tmp_path)
    for broken, why in (
        ("[]", "it is \\[\\]"),
        ("{}", "it has no weight_map"),
        ('{"weight_map": {"a": "one", "b": "one", "a": "two"}}', "it has the key 'a' twice"),
    ):
        index.write_text(broken)
        with pytest.raises(ConfigurationError, match=rf"/model\.safetensors\.index\.json is no index of shards: {why}"):
            load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigurationError, match=r"/model\.safetensors cannot be read as safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": []}, "names no model class"),
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}, "knows no causal language model"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number, not 'big'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_key_value_heads": 3}, "2 attention heads cannot share 3 key-value heads"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quant_method is 'hqq'; there are readers for compressed-tensors",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "needs 'original_max_position_embeddings'"),
        ({"dtype": "int3"}, "dtype 'int3' is none of"),
    ],
)
def test_a_config_that_cannot_be_served_says_why(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """An unknown architecture and every impossible value is refused with its key and value."""
    with pytest.raises(ConfigurationError, match=message):
        load(folder_of(tmp_path, tensors(), **changes))


def test_the_fallback_names_what_does_not_fit(tmp_path: Path) -> None:
    """transformers would fill in missing tensors at random; we refuse the folder and name them."""
    content = tensors()
    del content["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigurationError, match=r"missing tensors: \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load(folder_of(tmp_path, content), implementation="transformers")
    content |= tensors() | {"model.extra": torch.ones(1)}
    with pytest.raises(ConfigurationError, match=r"unexpected tensors: \['model\.extra'\]"):
        load(folder_of(tmp_path, content), implementation="transformers")


def test_taken_tensors_outlive_the_files(tmp_path: Path) -> None:
    """A tensor may be used after its files are closed and gone."""
    folder_of(tmp_path, tensors())
    with open_checkpoint(tmp_path, dtype=torch.float32, device=CPU) as weights:
        norm = weights.under("model").take("norm.weight", 16)
    expected = load_file(tmp_path / "model.safetensors")["model.norm.weight"].clone()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(norm, expected)


def test_dummy_weights_look_like_trained_ones() -> None:
    """Matrices have mean 0 and deviation 0.02, norms are ones, and no two rows are alike."""
    weights = Dummy(dtype=torch.float32, device=CPU)
    matrix = weights.take("layers.0.q_proj.weight", 1500, 1000)
    assert abs(matrix.mean()) < 1e-3
    assert 0.018 < matrix.std() < 0.022
    assert len({tuple(row) for row in matrix[:, :8].tolist()}) == 1500
    assert torch.equal(weights.take("layers.0.input_layernorm.weight", 7), torch.ones(7))


def test_a_tensor_can_be_read_into_its_place(tmp_path: Path) -> None:
    """Into a part of a larger tensor and its dtype, of the shape that is there; noise likewise, another for each name."""
    content = tensors()
    folder_of(tmp_path, content)
    stack = torch.zeros(3, 24, 16, dtype=torch.float64)
    with open_checkpoint(tmp_path, dtype=torch.float32, device=CPU) as weights:
        weights.under("model.layers.0.mlp").fill("up_proj.weight", stack[1])
        with pytest.raises(ConfigurationError, match=r"has shape \[16, 24\], but the config makes it \[24, 16\]"):
            weights.fill("model.layers.0.mlp.down_proj.weight", stack[2])
    assert torch.equal(stack[1].float(), content["model.layers.0.mlp.up_proj.weight"])
    assert not stack[0].any() and not stack[2].any()
    taken, filled = Dummy(dtype=torch.float32, device=CPU), Dummy(dtype=torch.float32, device=CPU)
    parts = torch.empty(2, 1500, 1000)
    for name, part in zip("ab", parts, strict=True):
        filled.fill(f"{name}.weight", part)
        assert torch.equal(part, taken.take(f"{name}.weight", 1500, 1000))
    assert not torch.equal(parts[0], parts[1])


@pytest.mark.parametrize("at", ['"hidden_size"', '"bits"'])
def test_a_config_that_has_a_key_twice_is_refused(at: str, tmp_path: Path) -> None:
    """Wherever in it: the model's own, or one of its `quantization_config`. The file and the key are named."""
    config = tmp_path / "config.json"
    content = json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    config.write_text(content.replace(at, f"{at}: 8, {at}"))
    with pytest.raises(
        ConfigurationError, match=rf"/config\.json cannot be read as a JSON object: .*{at[1:-1]}' twice"
    ):
        load(tmp_path)


def test_the_end_tokens_are_the_generation_configs(tmp_path: Path) -> None:
    """generation_config.json decides where it names end tokens, one or several; else config.json; else there are none."""
    assert eos_token_ids(tmp_path) == frozenset()
    folder_of(tmp_path, None)
    assert eos_token_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert eos_token_ids(tmp_path) == {7, 8}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert eos_token_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"generation_config\.json cannot be read as a JSON object: Expecting"):
        eos_token_ids(tmp_path)
