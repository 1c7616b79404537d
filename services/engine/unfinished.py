"""Long work that survives the process that does it: its folder is one command's, and one process's at a time, and files in it appear
whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigurationError
from services.engine.strict_json import object_of


class Unusable(ConfigurationError):
    """What an earlier process left is nothing that this command can go on from; says what to do."""


class Damaged(Unusable):
    """It cannot be read."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(
            f"{path} is missing or damaged ({why}); remove {path.parent}, and the same command begins anew"
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end of the block becomes `path`, at once. If the block raises, `path` is as it was, and nothing
    is beside it."""
    aside = path.with_name(f"{path.name}.new")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def claimed(file: Path, command: Mapping[str, Any]) -> Iterator[None]:
    """The folder of `file`, which says what its work is for, belongs to this command and until the end of the block to this process. It
    is made, or as an earlier process left it. Raises `Unusable` if it is another command's, with what differs, or does not say whose;
    `ConfigurationError` if another process is at work in it."""
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made: {error}") from error
    with lock:  # the system drops it when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"another process is at work in {folder}") from error
        _claim(file, command)
        yield


def _claim(file: Path, command: Mapping[str, Any]) -> None:
    asked = json.loads(json.dumps(command))
    if not file.is_file():
        with whole(file) as aside:
            aside.write_text(json.dumps(asked, indent=2))
        return
    begun = read_object(file)
    different = sorted(key for key in asked.keys() | begun.keys() if asked.get(key) != begun.get(key))
    if different:
        what = "; ".join(f"{key} was {begun.get(key)!r} and is {asked.get(key)!r}" for key in different)
        raise Unusable(
            f"{file.parent} was begun by another command: {what}. Ask for the same, give another OUT, or remove that folder"
        )


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that an earlier process left there. Raises `Damaged` if it is none."""
    try:
        return object_of(file.read_text())
    except ValueError as error:
        raise Damaged(file, error) from error
