"""What a process that is killed leaves behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from services.engine.unfinished import Damaged, claimed, whole


def test_a_file_appears_whole(tmp_path: Path) -> None:
    """Until all of it is written there is what was there before."""
    path = tmp_path / "file"
    for content, before in (("one", None), ("two", "one")):
        with whole(path) as aside:
            aside.write_text(content)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    with pytest.raises(RuntimeError), whole(path) as aside:
        aside.write_text("thr")
        raise RuntimeError("killed")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    """And one command's, until somebody removes it; the error says what differs."""
    file = tmp_path / "work" / "command.json"
    with claimed(file, {"steps": 5}), pytest.raises(ConfigurationError, match="another process is at work in .*work$"):
        claimed(file, {"steps": 5}).__enter__()
    with claimed(file, {"steps": 5}):
        pass
    with pytest.raises(ConfigurationError, match="another command: seed was None and is 1; steps was 5 and is 6"):
        claimed(file, {"steps": 6, "seed": 1}).__enter__()


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_folder_that_does_not_say_whose_it_is_must_be_removed(content: str, tmp_path: Path) -> None:
    """Nobody can tell whether the work in it is this command's."""
    file = tmp_path / "work" / "command.json"
    file.parent.mkdir()
    file.write_text(content, encoding="latin-1")
    with pytest.raises(Damaged, match=r"work/command\.json is missing or damaged \(.*\); remove .*work, and the same"):
        claimed(file, {"steps": 5}).__enter__()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands in its way."""
    (tmp_path / "work").write_text("")
    with pytest.raises(ConfigurationError, match="work cannot be made"):
        claimed(tmp_path / "work" / "command.json", {}).__enter__()
