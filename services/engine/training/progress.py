"""What survives an interruption: a file with all that the next step needs, and the curve so far."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.errors import ConfigurationError


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

    def begin(self) -> None:
        """Makes the folder, or finds one that was left. Raises `ConfigurationError` if the result is there already, or the folder is
        another training's."""
        if self.out.exists():
            raise ConfigurationError(f"{self.out} exists; choose another folder, or remove it")
        said = json.dumps(self.task, indent=2, sort_keys=True)
        if (self.folder / "task.json").exists():
            if (self.folder / "task.json").read_text() != said:
                raise ConfigurationError(
                    f"{self.folder} holds a training that was begun otherwise; give the same flags to go on with it, or remove it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "task.json", said)

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
        torch.save(state, self.folder / "state.pt.new")
        os.replace(self.folder / "state.pt.new", self.folder / "state.pt")

    def finish(self) -> Path:
        """The folder in which the result is to be put together; `publish` makes it the result."""
        result = self.folder / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        training = {"task": self.task, "curve": [asdict(point) for point in self.curve]}
        _write(result / "training.json", json.dumps(training, indent=2))
        return result

    def publish(self) -> None:
        """The result is whole."""
        os.replace(self.folder / "result", self.out)
        shutil.rmtree(self.folder)


def _write(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    os.replace(new, path)
