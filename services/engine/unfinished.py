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


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end of the block becomes `path`, at once. If the block raises, `path` is as it was."""
    aside = path.with_name(f"{path.name}.new")
    yield aside
    os.replace(aside, path)


@contextmanager
def claimed(file: Path, command: Mapping[str, Any]) -> Iterator[None]:
    """The folder of `file`, which says what its work is for, belongs to this command and until the end of the block to this process. It
    is made, or as an earlier process left it. Raises `ConfigurationError` if it is another command's, with what differs, or another
    process's."""
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
    begun = json.loads(file.read_text())
    different = sorted(key for key in asked.keys() | begun.keys() if asked.get(key) != begun.get(key))
    if different:
        what = "; ".join(f"{key} was {begun.get(key)!r} and is {asked.get(key)!r}" for key in different)
        raise ConfigurationError(
            f"{file.parent} was begun by another command: {what}. Ask for the same, give another OUT, or remove that folder"
        )
