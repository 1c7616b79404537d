"""Cursors as clients see them: one opaque string, the base64url form of the `Cursor` message without padding."""

from __future__ import annotations

import base64
import binascii

from google.protobuf.message import DecodeError

from holdfast.errors import InvalidRequest
from holdfast.v1.generation_pb2 import Cursor


def encode(cursor: Cursor) -> str:
    """The cursor as a client gets it."""
    return base64.urlsafe_b64encode(cursor.SerializeToString()).rstrip(b"=").decode()


def decode(text: str) -> Cursor:
    """The cursor that a client gave back.

    Raises:
        InvalidRequest: the mesh never gave out such a cursor.
    """
    try:
        cursor = Cursor.FromString(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, DecodeError, ValueError) as error:
        raise InvalidRequest("not a cursor of this mesh; give back one as it came", field="cursor") from error
    if not cursor.request_id or len(cursor.next_index) != len(cursor.prefix_hash) or not cursor.next_index:
        raise InvalidRequest("not a cursor of this mesh: it names no request and choices", field="cursor")
    return cursor
