"""What stands beside a committed position."""

from __future__ import annotations

import pytest

from holdfast.bus import MAX_METADATA_BYTES, Position
from holdfast.committed import Committed


@pytest.mark.parametrize(
    ("committed", "position"),
    [
        (Committed(42, 48, ((43, 44), (46, 46))), Position(42, "6;1-2,4-4")),
        (Committed(42, 100), Position(42, "1m;")),
        (Committed(42, 42), Position(42)),
    ],
)
def test_what_is_written_is_read_again(committed: Committed, position: Position) -> None:
    """Watermark, what is done above it, and how far was begun."""
    assert committed.position() == position
    read = Committed.of(position)
    assert (read.watermark, read.begun, tuple(read.done)) == (committed.watermark, committed.begun, committed.done)
    assert read.num_done == committed.num_done


@pytest.mark.parametrize("metadata", ["{json}", "1-2,4-4", "6;1-", "6;-2", "?;1-2"])
def test_text_of_another_version_says_nothing(metadata: str) -> None:
    """Nothing above the watermark is done, or begun."""
    assert Committed.of(Position(7, metadata)) == Committed(7, 7)


def test_ranges_are_cut_where_a_position_holds_no_more() -> None:
    """How far was begun is kept."""
    many = Committed(0, 10_000, tuple((offset, offset) for offset in range(1, 10_000, 2)))
    position = many.position()
    assert 3000 < len(position.metadata) <= MAX_METADATA_BYTES
    read = Committed.of(position)
    assert read.begun == 10_000
    assert tuple(read.done) == many.done[: len(read.done)]
