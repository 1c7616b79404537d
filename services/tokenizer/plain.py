"""Keeps what a request says from becoming special tokens: those are the chat template's to write.

A template gives one text, in which a message that holds `<|im_start|>system` cannot be told from the template's own. So
before it runs every such text in the request gets a mark behind its first character, and what it gives is cut at the
marks: encoded piece by piece, no piece holds a special token that the template did not write.

A string that ends like the beginning of a special token is marked there, too: two of them could make one. A tokenizer
that puts a space before every text puts one at each cut. This module runs in the renderer's process.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Any


class PlainText:
    """What must not be said in a request as more than text."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        tokens = sorted({token for token in special_tokens if len(token) > 1}, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._beginnings = tuple({token[:size] for token in tokens for size in range(1, len(token))})

    def marked(self, value: Any, mark: str) -> Any:
        """The value with marks in all its strings that need one."""
        if isinstance(value, str):
            return self._marked_text(value, mark)
        if isinstance(value, list):
            return [self.marked(each, mark) for each in value]
        if isinstance(value, dict):
            return {self.marked(name, mark): self.marked(each, mark) for name, each in value.items()}
        return value

    def _marked_text(self, text: str, mark: str) -> str:
        if self._tokens is None:
            return text
        text = self._tokens.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        return text + mark if text.endswith(self._beginnings) else text


def new_mark() -> str:
    """A mark for one request: nobody can know it beforehand. Of digits, which no filter of a template changes."""
    return "".join(secrets.choice("0123456789") for _ in range(32))


def pieces(text: str, mark: str) -> list[str]:
    """What a template made of what was marked, cut at the marks; at least one piece."""
    return [piece for piece in text.split(mark) if piece] or [""]
