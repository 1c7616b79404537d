"""Request ids: what a client calls its request, and what the log calls it.

A client may use an id twice, at two gateways or after a restart, and neither gateway can know. In the log no two requests
may have one: their answers would be taken for one another's. So an id that a client gave gets a few random digits behind
it there, and is shown without them. Ids that a gateway draws are the same in both places.
"""

from __future__ import annotations

import secrets
from typing import Final

MARK: Final = "~"
"""Between the two; no id of a client has it."""


def in_log(request_id: str) -> str:
    """A new id for a request that its client calls so."""
    return f"{request_id}{MARK}{secrets.token_hex(4)}"


def of_client(request_id: str) -> str:
    """What the client calls the request that the log calls so."""
    return request_id.partition(MARK)[0]
