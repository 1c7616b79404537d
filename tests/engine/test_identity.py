"""What a model folder is, beside its name."""

from __future__ import annotations

import json
from pathlib import Path

from services.engine.identity import fingerprint, num_parameters


def write_weights(folder: Path, name: str, content: bytes) -> None:
    """A safetensors file of one tensor of bytes."""
    tensor = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + content)


def test_parameters_are_counted_over_all_files(tmp_path: Path) -> None:
    """Metadata is no tensor; a folder without weights has none."""
    assert num_parameters(tmp_path) == 0
    write_weights(tmp_path, "a.safetensors", bytes(10))
    write_weights(tmp_path, "b.safetensors", bytes(7))
    assert num_parameters(tmp_path) == 17


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
