"""Cursors on their way to a client and back."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest

from holdfast.accept import Prefix, Source
from holdfast.errors import ConfigurationError, InvalidRequest
from holdfast.events import FinishReason, Usage
from services.gateway.choice import ChoiceEnd, Mark, Place
from services.gateway.cursor import Cursor, Cursors

OLD, NEW = b"the mesh's old key", b"the mesh's new key"

CURSOR = Cursor(
    request_id="r-1",
    source=Source(2, 31),
    request_offset=77,
    reply_partition=3,
    mark=Mark(1 << 40, (1 << 32) + 7),
    places=(
        Place(Prefix(5, 0xFFFFFFFF), context=(1, 2, 3, 4, 151_000), held="\nUs", num_characters=21),
        Place(context=(9,)),
        Place(Prefix(2, 1), end=ChoiceEnd(FinishReason.STOP, Usage(3, 1, 2), "END"), end_taken=True),
    ),
)


def test_a_cursor_comes_back_as_it_went() -> None:
    """Decoding gives what was encoded, and the string is safe in a URL and a header."""
    text = Cursors([NEW]).encode(CURSOR)
    assert Cursors([NEW]).decode(text) == CURSOR
    assert text.replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize("text", ["", "!!!", "AAAA", "abc", "_" * 40, "A" * 60, "é" * 40, "A" * (1 << 20)])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    """A string that no mesh made names the field cursor in its error."""
    with pytest.raises(InvalidRequest) as caught:
        Cursors([NEW]).decode(text)
    assert caught.value.field == "cursor"


def test_an_altered_cursor_is_refused() -> None:
    """Whichever byte was changed, of the message or of the signature."""
    cursors = Cursors([NEW])
    signed = base64.urlsafe_b64decode(cursors.encode(CURSOR) + "==")
    for index in range(len(signed)):
        altered = bytearray(signed)
        altered[index] ^= 1
        with pytest.raises(InvalidRequest, match="altered"):
            cursors.decode(base64.urlsafe_b64encode(altered).rstrip(b"=").decode())


def test_a_cursor_of_another_mesh_is_refused() -> None:
    """What another key signed is good there alone; without a key one is drawn, and is nobody else's."""
    for one, other in ((Cursors([OLD]), Cursors([NEW])), (Cursors(), Cursors())):
        with pytest.raises(InvalidRequest, match="another mesh"):
            other.decode(one.encode(CURSOR))


@pytest.mark.parametrize("other", [{"reply_partition": 99}, {"source": Source(2, 99)}, {"source": Source(7, 0)}])
def test_a_cursor_to_partitions_that_there_are_not_is_of_another_version(other: dict[str, Any]) -> None:
    """Signed or not: a mesh with other topics has made it."""
    cursors = Cursors([NEW])
    with pytest.raises(InvalidRequest, match="another version"):
        cursors.decode(cursors.encode(replace(CURSOR, **other)))


def test_keys_can_be_changed_one_gateway_at_a_time() -> None:
    """The first key signs and all are accepted: while both are known everywhere, either order reads the other's."""
    before, between, after = Cursors([OLD, NEW]), Cursors([NEW, OLD]), Cursors([NEW])
    assert between.decode(before.encode(CURSOR)) == before.decode(between.encode(CURSOR)) == CURSOR
    assert after.decode(between.encode(CURSOR)) == CURSOR
    with pytest.raises(InvalidRequest):
        after.decode(before.encode(CURSOR))


def test_a_key_that_could_be_guessed_stops_the_start() -> None:
    """And is not repeated in the error."""
    with pytest.raises(ConfigurationError, match="at least 16 bytes") as caught:
        Cursors([NEW, b"hunter2"])
    assert "hunter2" not in str(caught.value)
