"""What a model folder is, beside its name: how many parameters, and a fingerprint that tells it from any other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 16 << 10


def num_parameters(folder: Path) -> int:
    """Numbers in the folder's weight files; 0 where it has none."""
    return sum(
        math.prod(tensor["shape"])
        for file in _weight_files(folder)
        for name, tensor in _header(file).items()
        if name != "__metadata__"
    )


def fingerprint(folder: Path) -> bytes:
    """Equal for equal models: of the config, and of samples from all over the weight files. Reading them whole would
    take longer than loading does; two models that differ at all differ in most of their weights."""
    digest = sha256((folder / "config.json").read_bytes())
    for file in _weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for index in range(_SAMPLES):
                content.seek(index * size // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.digest()


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    """A safetensors file begins with the length of a JSON header, 8 bytes little-endian, and the header."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header: dict[str, dict[str, list[int]]] = json.loads(content.read(length))
        return header
