"""Cursors on their way to a client and back."""

from __future__ import annotations

import pytest

from holdfast.errors import InvalidRequest
from holdfast.v1.generation_pb2 import REQUEST_CLASS_BATCH, Cursor, SourcePartition
from services.gateway import cursor


def test_a_cursor_comes_back_as_it_went() -> None:
    """Decoding gives the message that was encoded, and the string is safe in a URL and a header."""
    message = Cursor(
        reply_partition=3,
        offset=1 << 40,
        request_id="r-1",
        next_index=[5, 0],
        prefix_hash=[0xFFFFFFFF, 0],
        epoch=(1 << 32) + 7,
        source=SourcePartition(request_class=REQUEST_CLASS_BATCH, partition=31),
    )
    text = cursor.encode(message)
    assert cursor.decode(text) == message
    assert text.replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize("text", ["", "!!!", "AAAA", "abc", "_" * 40, cursor.encode(Cursor(request_id="r"))])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    """A string that the mesh did not make names the field cursor in its error."""
    with pytest.raises(InvalidRequest) as caught:
        cursor.decode(text)
    assert caught.value.field == "cursor"
