"""What a group says of a partition beside its position: which records above it are done, and how far it has begun.

Requests end in another order than they came. The position is the **low watermark**, the offset of the first record that
is not done; the text kept beside it says the rest.

    offsets    40 41 42 43 44 45 46 47 48
    done        x  x     x  x     x         watermark 42, done above it 43-44 and 46
    begun       x  x  x  x  x  x  x         begun up to 47: from there on records wait for somebody to take them

The text is relative to the watermark, in base 36: `5;1-2,4-4`. Its ranges are cut where it would be longer than a position
may hold. Text of another version says nothing: nothing above the watermark is done, or begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.bus import MAX_METADATA_BYTES, Position

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Committed:
    """One partition's records from the watermark on."""

    watermark: int
    begun: int
    """The offset behind the last record that was begun; not below the watermark."""
    done: Sequence[tuple[int, int]] = ()
    """First and last offset of each run of records that are done above the watermark, in order."""

    @property
    def num_done(self) -> int:
        """Above the watermark."""
        return sum(last - first + 1 for first, last in self.done)

    def position(self) -> Position:
        """As it is committed."""
        if self.begun <= self.watermark:
            return Position(self.watermark)
        text, separator = f"{_base36(self.begun - self.watermark)};", ""
        for first, last in self.done:
            more = f"{separator}{_base36(first - self.watermark)}-{_base36(last - self.watermark)}"
            if len(text) + len(more) > MAX_METADATA_BYTES:
                break
            text, separator = text + more, ","
        return Position(self.watermark, text)

    @classmethod
    def of(cls, position: Position) -> Committed:
        """As it was committed."""
        watermark = position.offset
        begun, _, ranges = position.metadata.partition(";")
        try:
            done = [
                (watermark + int(first, 36), watermark + int(last, 36))
                for first, _, last in (part.partition("-") for part in filter(None, ranges.split(",")))
            ]
            return cls(watermark, watermark + int(begun or "0", 36), done)
        except ValueError:
            return cls(watermark, watermark)


def _base36(number: int) -> str:
    assert number >= 0
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
        if not number:
            return digits
