"""Request ids: what a client calls its request, and what the log calls it.

A client may use an id twice, at two gateways or after a restart, and neither gateway can know. In the log no two requests
may have one: their answers would be taken for one another's. So an id that a client gave gets a few random digits behind
it there, and is shown without them. An id that is drawn because a request has none is the same in both places.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from holdfast.errors import InvalidRequest

MARK: Final = "~"
"""Between the two; no id of a client has it."""

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def check(request_id: str, *, field: str = "request_id") -> None:
    """Raises InvalidRequest unless a client may call a request so."""
    if not _ID.fullmatch(request_id):
        given = repr(request_id if len(request_id) <= 40 else request_id[:40] + "...")
        name = field.rpartition(".")[2]
        raise InvalidRequest(f"{name} must be 1 to 128 characters of A-Z a-z 0-9 _ . : -, not {given}", field=field)


def in_log(request_id: str) -> str:
    """A new id for a request that its client calls so."""
    return f"{request_id}{MARK}{secrets.token_hex(4)}"


def of_client(request_id: str) -> str:
    """What the client calls the request that the log calls so."""
    return request_id.partition(MARK)[0]
