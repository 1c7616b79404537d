"""Where a checkpoint grows: a folder beside it, from which the same command goes on.

    command.json           what was asked for; another command does not touch the folder
    costs.json             what matrices cost in each format, where a budget asks for it; they are the same for any budget
    rules.txt              what was chosen by them: layers are of one choice
    layer-00007.safetensors   a finished layer
    states-00008.safetensors  what the text is before the next one
    checkpoint/            all of it, when the layers are done; then it is moved to its place

The states are there before the layer that gave them, so that of whatever
is left by a process that was killed, the finished layers are enough to go on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quantize.shards import write
from services.engine.unfinished import Damaged, Unusable, claimed, whole

SUFFIX = ".work"


class WorkFolder:
    """That of one command. Open it with `work_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def costs(self) -> Path:
        """A file for what matrices cost."""
        return self.path / "costs.json"

    @property
    def num_done(self) -> int:
        """How many layers are finished."""
        count = 0
        while self._layer(count).is_file():
            count += 1
        return count

    @property
    def is_begun(self) -> bool:
        """Whether there is anything in it that took time."""
        return self.num_done > 0 or self.costs.exists()

    def layers(self, count: int) -> list[Path]:
        """The files of so many layers."""
        return [self._layer(index) for index in range(count)]

    def keep(self, index: int, tensors: Mapping[str, Tensor], states_WNI: Tensor | None) -> None:
        """This layer is finished; the text is so before the next one."""
        if states_WNI is not None:
            self.keep_states(index + 1, states_WNI)
        self.save(self._layer(index), tensors)
        self._states(index).unlink(missing_ok=True)

    def keep_states(self, index: int, states_WNI: Tensor) -> None:
        """The text before this layer."""
        self.save(self._states(index), {"states": states_WNI})

    def states(self, index: int) -> Tensor:
        """The text before this layer, which was kept. Raises `Damaged` if it is not there whole."""
        path = self._states(index)
        try:
            return load_file(path)["states"]
        except (SafetensorError, OSError, KeyError) as error:
            raise Damaged(path, error) from error

    def keep_to(self, rules: str) -> None:
        """Layers are made by these rules, which a budget gave. Raises `Unusable` if finished ones were made by others."""
        path, count = self.path / "rules.txt", self.num_done
        if count and not (path.is_file() and path.read_text() == rules):
            raise Unusable(
                f"{self.path} holds {count} layers as another --budget wants them; ask for that one, give another OUT, or remove "
                f"{self.path}/layer-*: costs are not measured again"
            )
        with whole(path) as aside:
            aside.write_text(rules)

    def check(self) -> None:
        """Raises `Damaged` if a finished layer is not there whole."""
        for path in self.layers(self.num_done):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise Damaged(path, error) from error

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A file of tensors, whole or not at all."""
        with whole(path) as aside:
            write({name: each.cpu().contiguous() for name, each in tensors.items()}, aside)

    def finish(self, checkpoint: Path, out: Path) -> None:
        """The checkpoint is whole: it is moved to its place, and nothing else is left."""
        checkpoint.rename(out)
        shutil.rmtree(self.path)

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index:05}.safetensors"

    def _states(self, index: int) -> Path:
        return self.path / f"states-{index:05}.safetensors"


@contextmanager
def work_folder(out: Path, command: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The folder beside `out` in which this command works, alone; made, or as an earlier process left it. What stops the block gets a note
    if the folder remains. Raises `ConfigurationError` if `out` is there, or if another process is at work in the folder; `Unusable` if nothing
    can go on from what is in it."""
    if out.exists():
        raise ConfigurationError(f"{out} is there already; give another name, or remove it")
    path = out.with_name(out.name + SUFFIX)
    with claimed(path / "command.json", command):
        work = WorkFolder(path)
        work.check()
        try:
            yield work
        except Unusable:
            raise
        except BaseException as error:
            if work.is_begun:
                whose = (
                    "the same command goes on" if work.num_done else "the same command, or another --budget, goes on"
                )
                error.add_note(f"{path} remains, with what is finished; {whose} from there")
            else:
                shutil.rmtree(path)
            raise
