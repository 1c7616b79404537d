"""What is read: the tokens of files, in windows, in an order that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quality.passages import text_of


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens one after the other, int32."""

    ids: Tensor
    length: int
    """Of a window: so many tokens are predicted, each from those before it."""

    @property
    def num_windows(self) -> int:
        """Windows that do not overlap."""
        return (len(self.ids) - 1) // self.length

    def window(self, number: int) -> Tensor:
        """So many tokens and the next one, [length + 1], int64."""
        start = number * self.length
        return self.ids[start : start + self.length + 1].long()

    def batch(self, step: int, size: int, *, seed: int, share: range) -> Tensor:
        """The windows of a step that a rank has, [share, length + 1]. All windows come once before any comes again, each time in
        another order; what a step has does not depend on the steps before it, nor on how many ranks share it."""
        numbers = [self._drawn(step * size + place, seed) for place in share]
        return torch.stack([self.window(number) for number in numbers])

    def _drawn(self, place: int, seed: int) -> int:
        epoch, place = divmod(place, self.num_windows)
        return _order(self.num_windows, f"{seed} {epoch}")[place]


@lru_cache(maxsize=2)
def _order(count: int, seed: str) -> Sequence[int]:
    """The numbers below `count` in the order of this seed."""
    return random.Random(seed).sample(range(count), count)


def split(paths: Sequence[Path], *, held_out: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Files to train on and files to judge by, about this share of the bytes. Raises `ConfigurationError` for fewer than two."""
    if len(paths) < 2:
        raise ConfigurationError("whole files are held out, so there must be at least two; give a folder with more")
    shuffled = random.Random(seed).sample(sorted(paths), len(paths))
    wanted = held_out * sum(path.stat().st_size for path in paths)
    apart: list[Path] = []
    while len(shuffled) > 1 and (not apart or sum(path.stat().st_size for path in apart) < wanted):
        apart.append(shuffled.pop())
    return sorted(shuffled), sorted(apart)


def tokens(paths: Sequence[Path], tokenizer: Tokenizer, *, between: int, length: int) -> Text:
    """The tokens of these files, with one `between` them. Raises `ConfigurationError` for what is no text, or too little of it."""
    ids: list[int] = []
    for path in paths:
        ids += [between, *tokenizer.encode(text_of(path), add_special_tokens=False).ids]
    if len(ids) <= length:
        raise ConfigurationError(
            f"{len(paths)} files hold {len(ids):,} tokens, and one window is {length:,}; give more text"
        )
    return Text(torch.tensor(ids, dtype=torch.int32), length)
