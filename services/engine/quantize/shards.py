"""The files of a checkpoint: finished layers gathered into few of them, and what stands beside weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.engine.weights import INDEX_FILE, SINGLE_FILE

MOST_BYTES = 2 << 30
"""Of a shard, unless one layer has more; so much memory gathering takes."""

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"})


def gather(files: Sequence[Path], folder: Path, *, most_bytes: int = MOST_BYTES) -> None:
    """Writes the tensors of these files there, as one file or as shards with an index."""
    shards = _grouped(files, most_bytes)
    places: dict[str, str] = {}
    total = 0
    for index, group in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for path in group:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        write(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
        total += sum(each.numel() * each.element_size() for each in tensors.values())
    if len(shards) > 1:
        index_of = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index_of, indent=2))


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A file of tensors. Raises OSError, with the path, where it cannot be written."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # which it raises of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def weight_bytes(folder: Path) -> int:
    """Of a checkpoint's files of tensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy_others(model: Path, folder: Path) -> None:
    """The tokenizer, the chat template, generation's defaults, the licence: every file of the model but weights and config."""
    for path in sorted(model.iterdir()):
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def _grouped(files: Sequence[Path], most_bytes: int) -> list[list[Path]]:
    """Neighbours together, as long as they are no larger."""
    groups: list[list[Path]] = []
    size = 0
    for path in files:
        more = path.stat().st_size
        if not groups or size + more > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += more
    return groups
