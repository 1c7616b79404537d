"""Ids to text as they come, without state.

Every id stands for some bytes, whatever its neighbours are, but for one thing: the tokenizers of the SentencePiece
family drop the space before the first word of a text. The text of a stream is its bytes read as UTF-8, in which each
maximal part that cannot become a character is one U+FFFD (Unicode 16, 3.9, "U+FFFD substitution of maximal subparts";
what both Python's and Rust's decoders do). A character that is not yet finished is at most three bytes long and is held
back.

It is held back in one of two places. Where it begins with an id, that id and those after it are not consumed, and come
again with the next ones. Where it begins within an id (or right behind a broken character, which would look unfinished
without it), all ids are consumed, and its bytes are found again at the end of the next message's context. Either way
the text shown is that of the consumed ids and of nothing else, which is what makes the two ways fit together.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import InvalidRequest
from services.tokenizer.loading import ModelTokenizer
from services.tokenizer.spelling import spelling


@dataclass(frozen=True, slots=True)
class Decoded:
    """New text of one stream."""

    text: str
    """Whole characters."""
    num_consumed: int
    """How many of the ids the text covers."""


class Detokenizer:
    """The bytes of every id of a model."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        """Raises: ConfigurationError: the tokenizer's decoder is of a kind not known here."""
        self._spelling = spelling(tokenizer.decoder)
        self._tokens: list[str] = [""] * tokenizer.vocab_size
        for token, id in tokenizer.backend.get_vocab().items():
            if id < tokenizer.vocab_size:
                self._tokens[id] = token
        self._bytes = [self._spelling.token(token) for token in self._tokens]
        self._bytes_without_special = [
            b"" if id in tokenizer.special_ids else spelled for id, spelled in enumerate(self._bytes)
        ]

    def decode(
        self, ids: Sequence[int], *, context: Sequence[int] = (), last: bool = False, show_special_tokens: bool = False
    ) -> Decoded:
        """The text of `ids` after `context`, the few ids before them.

        Raises:
            InvalidRequest: an id is not below the model's vocabulary size; `field` is `ids[i]` or `context[i]`.
        """
        table = self._bytes if show_special_tokens else self._bytes_without_special
        try:
            before = b"".join([table[id] for id in context])
            pieces = [table[id] for id in ids]
        except IndexError:
            raise self._unknown(context=context, ids=ids) from None
        if not before:
            self._begin(pieces, ids)
        data = _unfinished(before) + b"".join(pieces)
        text, num_read = _read(data)
        if last or num_read == len(data) or _unfinished(data[:num_read]):
            return Decoded(text, len(ids))
        return Decoded(text, _num_before_the_end(pieces, num_bytes=len(data) - num_read))

    def _begin(self, pieces: list[bytes], ids: Sequence[int]) -> None:
        """Spells the first id that has text as the first of a text."""
        for index, piece in enumerate(pieces):
            if piece:
                pieces[index] = self._spelling.first_token(self._tokens[ids[index]])
                return

    def _unknown(self, **fields: Sequence[int]) -> InvalidRequest:
        """What is wrong with ids of which one is too large."""
        size = len(self._tokens)
        name, index, id = next(
            (name, index, id) for name, ids in fields.items() for index, id in enumerate(ids) if id >= size
        )
        return InvalidRequest(f"token id {id} is not below the vocabulary's size, {size}", field=f"{name}[{index}]")


def _read(data: bytes) -> tuple[str, int]:
    """The text of the bytes, and how many it covers: all but those at the end that may still become a character."""
    text, num_read = codecs.utf_8_decode(data, "replace", False)
    unread = data[num_read:]
    if len(unread) == 2 and unread[0] == 0xED and unread[1] >= 0xA0:  # half a surrogate, for which Python would wait
        return text + "\ufffd\ufffd", len(data)
    return text, num_read


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that may still become a character."""
    return data[_read(data)[1] :]


def _num_before_the_end(pieces: list[bytes], *, num_bytes: int) -> int:
    """How many pieces come before the last bytes; all, where these begin within a piece or before the first."""
    count = len(pieces)
    while num_bytes > 0 and count > 0:
        count -= 1
        num_bytes -= len(pieces[count])
    return count if num_bytes == 0 else len(pieces)
