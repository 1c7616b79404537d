"""What a model folder is, beside its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from services.engine.identity import fingerprint, num_parameters


def write_weights(folder: Path, name: str, content: bytes) -> None:
    """A safetensors file of one tensor of bytes."""
    tensor = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + content)


def test_parameters_are_counted_over_all_files(tmp_path: Path) -> None:
    """Metadata is no tensor; a folder without weights has none."""
    (tmp_path / "config.json").write_text("{}")
    assert num_parameters(tmp_path) == 0
    write_weights(tmp_path, "a.safetensors", bytes(10))
    write_weights(tmp_path, "b.safetensors", bytes(7))
    assert num_parameters(tmp_path) == 17


@pytest.mark.parametrize("kind", ["gguf", "gptq"])
def test_where_numbers_are_kept_in_few_bits_the_config_tells_how_many_there_are(kind: str, tmp_path: Path) -> None:
    """Words of four bits are not what the model has."""
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
    ).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    write_weights(tmp_path, f"model.{'gguf' if kind == 'gguf' else 'safetensors'}", bytes(7))
    more = {"quantization_config": {"quant_method": kind}} if kind == "gptq" else {}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert num_parameters(tmp_path) == 2 * 10 * 8 + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8


def test_other_weights_or_another_config_are_another_model(tmp_path: Path) -> None:
    """Equal files have equal fingerprints; a change of either kind is seen."""
    (tmp_path / "config.json").write_text("{}")
    write_weights(tmp_path, "model.safetensors", bytes(1 << 20))
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    write_weights(tmp_path, "model.safetensors", bytes(range(256)) * (1 << 12))
    second = fingerprint(tmp_path)
    assert second != first
    assert fingerprint(tmp_path, weights=False) not in (first, second)
    write_weights(tmp_path, "model.safetensors", bytes(range(256)) * ((1 << 12) - 1) + bytes(256))
    assert fingerprint(tmp_path) not in (first, second)  # a last row alone
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint(tmp_path) not in (first, second)


def test_a_gguf_file_is_weights_too(tmp_path: Path) -> None:
    """Through a link as well; where there are safetensors, these are what is read."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "of-it").write_bytes(b"one")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "of-it")
    first = fingerprint(tmp_path)
    (tmp_path / "of-it").write_bytes(b"two")
    assert fingerprint(tmp_path) != first
    write_weights(tmp_path, "model.safetensors", bytes(10))
    third = fingerprint(tmp_path)
    (tmp_path / "of-it").write_bytes(b"one")
    assert fingerprint(tmp_path) == third
