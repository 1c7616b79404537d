"""What a model folder is, beside its name: how many parameters, and a fingerprint that tells it from any other."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path

from services.engine.models.spec import ModelSpec, read_config

_READERS = 8
"""Files that are read at a time."""


def num_parameters(folder: Path) -> int:
    """Numbers that the model has: those in the folder's weight files, 0 where it has none; where several are kept in one, what the config says."""
    config = read_config(folder)
    files = _weight_files(folder)
    if config.get("quantization_config") or any(file.suffix == ".gguf" for file in files):
        return ModelSpec.from_config(config).num_parameters
    return sum(
        math.prod(tensor["shape"]) for file in files for name, tensor in _header(file).items() if name != "__metadata__"
    )


def fingerprint(folder: Path, *, weights: bool = True) -> bytes:
    """Equal for equal models alone: of the config and, if `weights`, of every byte of the weight files. That takes a second
    for each gigabyte or two of the largest file; a model may differ from another in a single matrix, or in its first rows."""
    digest = sha256((folder / "config.json").read_bytes())
    files = _weight_files(folder) if weights else []
    with ThreadPoolExecutor(_READERS, "fingerprint") as readers:
        for file, content in zip(files, readers.map(_digest, files), strict=True):
            digest.update(file.name.encode() + content)
    return digest.digest()


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return file_digest(content, "sha256").digest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    """A safetensors file begins with the length of a JSON header, 8 bytes little-endian, and the header."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header: dict[str, dict[str, list[int]]] = json.loads(content.read(length))
        return header
