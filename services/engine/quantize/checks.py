"""What can be wrong with a checkpoint, found before anything is done with it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from services.engine.models.decoder import Decoder, ignored
from services.engine.models.spec import ModelSpec
from services.engine.quant.readers.source import FLOATS
from services.engine.shard import ALONE, Part
from services.engine.weights import Checkpoint, Weights, open_checkpoint


class Outline(Weights):
    """Tensors without rows in place of those that a model asks for, which the checkpoint must have; its experts' stacks have no memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(dtype=checkpoint.dtype, device=torch.device("meta"), shard=ALONE)
        self._checkpoint = checkpoint

    def take(self, name: str, *shape: int | Part) -> Tensor:
        whole = [size.of if isinstance(size, Part) else size for size in shape]
        self._checkpoint.require(name, *whole)
        return torch.empty(0, *whole[1:], dtype=self.dtype)

    def fill(self, name: str, out: Tensor) -> None:
        self._checkpoint.require(name, *out.shape)

    def leave(self, prefix: str) -> None:
        raise AssertionError("a rank that is alone leaves nothing to others")

    def input_scale(self, *names: str) -> Tensor:
        raise AssertionError("what is not quantized needs no scale")


def check_names(model: Path, spec: ModelSpec) -> None:
    """Raises `ConfigurationError`, with its name, for a tensor that the config asks for and that is missing or has another shape, and
    for one that the model has no place for. Only the heads of files are read."""
    with _opened(model) as checkpoint:
        Decoder(Outline(checkpoint), spec)
        checkpoint.finish(ignored=ignored(spec))


def check_values(model: Path, spec: ModelSpec) -> None:
    """Raises `ConfigurationError`, with its name, for a tensor that does not hold floats, or one that is not a finite number. All of them are
    read, one after the other, and once more when their layer's turn comes: the last one's comes when the work is nearly done."""
    with _opened(model) as checkpoint:
        for name in sorted(checkpoint.names):
            if any(fnmatchcase(name, glob) for glob in ignored(spec)):
                continue
            checkpoint.raw(name, *checkpoint.shape(name), dtypes=FLOATS)  # which refuses such


def _opened(model: Path) -> AbstractContextManager[Checkpoint]:
    return open_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
