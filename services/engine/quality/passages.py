"""What models are judged on: tokens, and which of them count."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from holdfast.errors import ConfigurationError

GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens that a model computes from an empty context, whatever it would have said itself."""

    ids: Sequence[int]
    first: int = 1
    """The first token that is judged, by what is predicted where the one before it stands; all after it are too."""

    def __post_init__(self) -> None:
        assert 1 <= self.first < len(self.ids), "a token is predicted from those before it"

    @property
    def num_judged(self) -> int:
        return len(self.ids) - self.first


def text_of(path: Path) -> str:
    """A file of text in UTF-8, packed by gzip or not. Raises `ConfigurationError` where it is something else, or empty."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is no text: byte {error.start:,} is not UTF-8; give a file of plain text, packed by gzip or not"
        ) from error
    if "\0" in text:
        raise ConfigurationError(f"{path} is no text: it holds characters NUL; give a file of plain text")
    if not text.strip():
        raise ConfigurationError(f"{path} is empty; give a file of text")
    return text


def tokenizer_of(folder: Path) -> Tokenizer:
    """That of a model's folder. Raises `ConfigurationError` if there is none."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigurationError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def windows_of(
    text: str, tokenizer: Tokenizer, *, length: int, most_tokens: int, name: object = "the text"
) -> list[Passage]:
    """The first tokens of a text, which errors call by this name, no special ones among them, in windows of this length; a rest that fills none is left out.
    Raises `ConfigurationError` where there is not one whole window."""
    assert length >= 2
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids[:most_tokens]
    if len(ids) < length:
        raise ConfigurationError(
            f"{name} is too short: it has {len(ids):,} tokens here, and a window {length:,}; give more text, ask for more tokens of "
            "it, or for shorter windows"
        )
    return [Passage(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
