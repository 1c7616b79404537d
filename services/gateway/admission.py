"""Whether a request may come in: how many at once, how much each, until when."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from holdfast import ids
from holdfast.errors import InvalidRequest, NotAccepted, Overloaded
from holdfast.events import Model
from holdfast.v1 import gateway_pb2, generation_pb2
from services.gateway.backlog import come_back
from services.gateway.settings import GatewaySettings
from services.gateway.validation import check_lengths, check_request

FIRST_STAY = 1.0
"""Seconds that a request is taken to keep its place, before any has ended."""

STAYS_REMEMBERED = 32
"""Over so many of the last requests, roughly, that is averaged: after so long about all places have changed hands."""

TIMEOUT_PASSED = "the request's timeout passed before its answer was complete"
"""What a client is told wherever that happens."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may come in, and what was decided for it."""

    request: gateway_pb2.GenerateRequest
    request_id: str
    """The client's, or drawn."""
    log_id: str
    """The same request's id in the log."""
    request_class: generation_pb2.RequestClass.ValueType
    num_choices: int
    seed: int
    """The client's, or drawn."""
    accepted_at: int
    """Nanoseconds since the epoch."""
    deadline: float | None
    """Seconds since the epoch after which nobody wants the answer; None for never."""

    def time_left(self) -> float | None:
        """Seconds until the deadline, not below 0."""
        return None if self.deadline is None else max(0.0, self.deadline - time.time())


@dataclass(slots=True)
class _Places:
    """As many as `max_streams`."""

    what: str
    """Holds them."""
    num_open: int = 0


class Admission:
    """Keeps the limits of one gateway."""

    def __init__(self, settings: GatewaySettings, *, refused: Callable[[str], None] = lambda reason: None) -> None:
        """`refused`: told of each refusal for want of a place."""
        self._settings = settings
        self._refused = refused
        self._new = _Places("requests")
        self._resumed = _Places("resumed streams")
        self._stay = FIRST_STAY
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_open(self) -> int:
        """Requests that hold a place."""
        return self._new.num_open + self._resumed.num_open

    def place(self) -> AbstractContextManager[None]:
        """A place among the new requests, for as long as the block runs.

        Raises:
            Overloaded: (entering it) all are taken.
            NotAccepted: (entering it) the gateway takes no more requests.
        """
        return self._taken(self._new)

    def resumed_place(self) -> AbstractContextManager[None]:
        """A place among those that were accepted before, here or elsewhere: new ones do not take it from them. As `place`."""
        return self._taken(self._resumed)

    @contextmanager
    def _taken(self, places: _Places) -> Iterator[None]:
        self._check(places)
        places.num_open += 1
        self._empty.clear()
        began = time.monotonic()
        try:
            yield
            self._stay += (time.monotonic() - began - self._stay) / STAYS_REMEMBERED
        finally:
            places.num_open -= 1
            if self.num_open == 0:
                self._empty.set()

    def _check(self, places: _Places) -> None:
        if self._closed:
            raise NotAccepted("this gateway is being stopped; ask another one, or later")
        if places.num_open >= self._settings.max_streams:
            self._refused("streams")
            retry_after = come_back(self._stay)
            raise Overloaded(
                f"{places.num_open} {places.what} are open, as many as this gateway takes; "
                f"try again in {retry_after:.0f} seconds",
                retry_after=retry_after,
            )

    def close(self) -> None:
        """Gives no further request a place."""
        self._closed = True

    async def empty(self) -> None:
        """Returns when no request holds a place."""
        await self._empty.wait()

    def admit(
        self, request: gateway_pb2.GenerateRequest, model: Model, *, call_time_left: float | None = None
    ) -> Admitted:
        """Checks all that can be checked before the prompt is tokenized, and decides what the client left open.
        `call_time_left`: seconds until the call itself ends.

        Raises:
            InvalidRequest: a field has a value that it may not have, or asks for more than this gateway gives.
            NotFound: the mesh does not serve the model.
        """
        check_request(request, model, max_prompt_bytes=self._settings.max_prompt_bytes)
        num_choices = request.num_choices if request.HasField("num_choices") else 1
        if num_choices > self._settings.max_choices:
            raise InvalidRequest(
                f"num_choices must be at most {self._settings.max_choices} at this gateway, not {num_choices}",
                field="num_choices",
            )
        timeout = self._timeout(request.timeout) if request.HasField("timeout") else self._capped(call_time_left)
        now = time.time_ns()
        request_id = request.request_id or uuid.uuid4().hex
        return Admitted(
            request=request,
            request_id=request_id,
            log_id=ids.in_log(request_id) if request.request_id else request_id,
            request_class=request.request_class or generation_pb2.REQUEST_CLASS_INTERACTIVE,
            num_choices=num_choices,
            seed=request.sampling.seed if request.sampling.HasField("seed") else secrets.randbits(64),
            accepted_at=now,
            deadline=None if timeout is None else now / 1e9 + timeout,
        )

    def check_prompt(self, admitted: Admitted, prompt_ids: Sequence[int], model: Model) -> None:
        """Raises InvalidRequest unless prompt and answer fit."""
        check_lengths(len(prompt_ids), admitted.request.stop, model, max_prompt=self._settings.max_prompt_tokens)

    def _capped(self, call_time_left: float | None) -> float | None:
        """The time that the call leaves; many clients say "never" by a deadline in centuries."""
        return None if call_time_left is None else min(call_time_left, self._settings.max_timeout_seconds)

    def _timeout(self, timeout: Duration) -> float:
        seconds = timeout.seconds + timeout.nanos / 1e9
        if not 0 < seconds <= self._settings.max_timeout_seconds:
            raise InvalidRequest(
                f"timeout must be above 0 and at most {self._settings.max_timeout_seconds:g} seconds, not {seconds:g}",
                field="timeout",
            )
        return seconds
