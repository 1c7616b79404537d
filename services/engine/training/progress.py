"""What survives an interruption: a file with all that the next step needs, and the curve so far."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.errors import ConfigurationError
from services.engine.unfinished import claimed, whole


@dataclass(frozen=True, slots=True)
class Point:
    """How things stood after some steps. Losses are in nats for a token."""

    step: int
    cross_entropy: float
    """Of the last step's text."""
    kl: float
    held_out_cross_entropy: float
    held_out_kl: float
    learning_rate: float
    tokens_per_second: float


@dataclass(slots=True)
class Progress:
    """Of one training, in a folder beside its result until that is whole."""

    out: Path
    task: Mapping[str, Any]
    """All that decides what comes out; a folder of another task is not taken up."""
    step: int = 0
    """Steps that are done."""
    curve: list[Point] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.out.with_name(f".{self.out.name}.training")

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Makes the folder, or finds one that was left; until the block ends it is this process's. Raises `ConfigurationError` if the
        result is there already, or the folder is another training's or another process's."""
        if self.out.exists():
            raise ConfigurationError(f"{self.out} exists; choose another folder, or remove it")
        with claimed(self.folder / "task.json", self.task):
            yield

    def load(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        """Takes up what `save` left, if it left anything. Raises `ConfigurationError` where that cannot be read."""
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.curve = state["step"], [Point(**point) for point in state["curve"]]
        except Exception as error:  # whatever a damaged file makes torch say
            raise ConfigurationError(
                f"{path} cannot be taken up: {error}; remove {self.folder} to begin anew"
            ) from error

    def save(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Leaves all that the next step needs, whole or not at all."""
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": self.step,
            "curve": [asdict(point) for point in self.curve],
        }
        with whole(self.folder / "state.pt") as aside:
            torch.save(state, aside)

    def result(self) -> Path:
        """An empty folder in which the result is to be put together; `publish` makes it the result."""
        shutil.rmtree(self._result, ignore_errors=True)
        self._result.mkdir()
        return self._result

    def publish(self) -> None:
        """The result is whole, but for how it came about."""
        training = {"task": self.task, "curve": [asdict(point) for point in self.curve]}
        (self._result / "training.json").write_text(json.dumps(training, indent=2))
        os.replace(self._result, self.out)
        shutil.rmtree(self.folder)

    @property
    def _result(self) -> Path:
        return self.folder / "result"
