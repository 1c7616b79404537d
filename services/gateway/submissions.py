"""What was submitted here of late: a client that did not hear the answer asks again, and must not get a second request."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from holdfast.errors import AlreadyExists
from holdfast.events import Accepted
from holdfast.topics import TOKENS
from holdfast.v1 import gateway_pb2

KEPT_SECONDS = TOKENS.retention.total_seconds()
"""How long a submission is remembered: as long as its answer can be read."""

MOST = 16_384
"""Submissions that are remembered; the oldest is forgotten first. Another gateway, or this one after a restart, knows none
of them."""


@dataclass(frozen=True, slots=True)
class _Submission:
    digest: bytes
    """Of all that the request says."""
    accepted: asyncio.Task[Accepted]
    began: float


class Submissions:
    """Makes of calls that say the same under the same id one request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds."""
        self._clock = clock
        self._known: OrderedDict[str, _Submission] = OrderedDict()

    async def once(
        self, request: gateway_pb2.GenerateRequest, submit: Callable[[], Coroutine[Any, Any, Accepted]]
    ) -> Accepted:
        """What `submit` returned for the first such call, to the end even where its caller leaves; or raised, and then the
        next call is a first one. A request without an id is a new one each time.

        Raises:
            AlreadyExists: a request of this id was submitted that says something else.
        """
        if not request.request_id:
            return await submit()
        digest = sha256(request.SerializeToString(deterministic=True)).digest()
        self._forget_old()
        known = self._known.get(request.request_id)
        if known is None:
            known = self._begin(request.request_id, digest, submit)
        elif known.digest != digest:
            raise AlreadyExists(
                f"a request with the id {request.request_id} was submitted, and it says something else; "
                "choose another id, or none"
            )
        return await asyncio.shield(known.accepted)

    def _begin(
        self, request_id: str, digest: bytes, submit: Callable[[], Coroutine[Any, Any, Accepted]]
    ) -> _Submission:
        submission = self._known[request_id] = _Submission(digest, asyncio.create_task(submit()), self._clock())
        submission.accepted.add_done_callback(lambda task: self._ended(request_id, task))
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        return submission

    def _forget_old(self) -> None:
        """Those whose answers the log keeps no longer: to name them again would help nobody."""
        while self._known and self._clock() - next(iter(self._known.values())).began > KEPT_SECONDS:
            self._known.popitem(last=False)

    def _ended(self, request_id: str, task: asyncio.Task[Accepted]) -> None:
        known = self._known.get(request_id)
        if (task.cancelled() or task.exception() is not None) and known is not None and known.accepted is task:
            del self._known[request_id]
