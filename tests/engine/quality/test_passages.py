"""Texts that models are judged on."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from services.engine.quality.passages import Passage, text_of, tokenizer_of, windows_of

TEXT = "Once upon a time, there was a café.\n" * 20


def test_a_text_may_be_packed(tmp_path: Path) -> None:
    """Whatever the file is called."""
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed.txt"
    plain.write_text(TEXT, encoding="utf-8")
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert text_of(plain) == text_of(packed) == TEXT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; give a file of text"),
        (b" \n\n", "is empty"),
        (gzip.compress(b""), "is empty"),
        (b"words \xff\xfe", "is no text: byte 6 is not UTF-8"),
        (b"words \0", "is no text: it holds characters NUL"),
        (gzip.compress(TEXT.encode())[:-20], "cannot be read"),
    ],
    # By names: packed bytes hold the time at which they were packed, and several processes must know a test by the same name.
    ids=["empty", "spaces", "packed-empty", "no-utf-8", "nul", "cut-short"],
)
def test_what_is_no_text_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    """By the file's name."""
    file = tmp_path / "some.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"some.txt {says}"):
        text_of(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """As one that may not be read."""
    with pytest.raises(ConfigurationError, match="nosuch cannot be read: .*No such file"):
        text_of(tmp_path / "nosuch")


def test_windows_are_whole_and_follow_one_another(stories260k: Path) -> None:
    """What fills no window is left out, and so are special tokens."""
    tokenizer = tokenizer_of(stories260k)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = windows_of(TEXT, tokenizer, length=30, most_tokens=100)
    assert windows == [Passage(ids[:30]), Passage(ids[30:60]), Passage(ids[60:90])]
    assert windows[0].num_judged == 29


def test_a_text_without_a_whole_window_is_refused(stories260k: Path) -> None:
    """With what it has and what it lacks."""
    with pytest.raises(ConfigurationError, match=r"too short: it has 20 tokens here, and a window 1,024"):
        windows_of(TEXT, tokenizer_of(stories260k), length=1024, most_tokens=20)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """The file that is missing is named."""
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json is no tokenizer"):
        tokenizer_of(tmp_path)
