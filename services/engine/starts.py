"""Which requests begin when, so that one of which engines die ends few of them, and no other requests.

Whoever takes a request over must be able to tell how often it was begun in vain. So an engine announces that it begins a
request, by an entry without tokens where its tokens will be. One that is new begins at once, its announcement on its way
beside it: its first token waits for nothing. One that others may have begun begins when the log has the announcement.

A suspect, one that was begun in vain before, begins alone among suspects: the next one follows when the log has some tokens
of it, or its end (`trials`). All others begin beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby

from holdfast.ownership import Standing
from services.engine.emit import Emitter
from services.engine.requests import Request
from services.engine.trials import Trials


class Starts:
    """The requests that may be answered, up to their first step. Lives in the event loop."""

    def __init__(self, emitter: Emitter, *, begin: Callable[[Request], None]) -> None:
        """`begin` hands a request to the scheduler. It is called for requests that were dropped meanwhile, too."""
        self._emitter = emitter
        self._begin = begin
        self._new: list[Request] = []
        self._inherited: list[Request] = []
        self._trials: Trials[Request] = Trials(lambda request: (not request.interactive, request.timestamp_ms))
        self._wake = asyncio.Event()

    def put(self, request: Request, standing: Standing) -> None:
        """It may be answered, and goes on from there."""
        if standing.is_suspect:
            request.on_trial = True
            self._trials.add(request)
        elif standing.is_new:
            self._new.append(request)
        else:
            self._inherited.append(request)
        self._wake.set()

    def over(self, request: Request) -> None:
        """The log has enough of it to say that this engine did not die of it; or it is done, or another engine's."""
        request.on_trial = False
        self._trials.over(request)
        self._wake.set()

    async def run(self) -> None:
        """Serves until it is cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._turn()

    def _turn(self) -> None:
        """Begins what is due: what came at once is announced at once."""
        new, self._new = [each for each in self._new if each.open], []
        inherited, self._inherited = [each for each in self._inherited if each.open], []
        if (suspect := self._trials.next()) is not None:
            inherited.append(suspect)
        for requests in _by_reply_partition(new):
            self._emitter.announce(requests, confirmed=_nothing)
            self._begin_all(requests)
        for requests in _by_reply_partition(inherited):
            self._emitter.announce(requests, confirmed=partial(self._begin_all, requests))

    def _begin_all(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._begin(request)


def _by_reply_partition(requests: Iterable[Request]) -> list[list[Request]]:
    """So that none waits for the acks of another partition."""
    ordered = sorted(requests, key=_reply_partition)
    return [list(group) for _, group in groupby(ordered, _reply_partition)]


def _reply_partition(request: Request) -> int:
    return request.reply_partition


def _nothing() -> None:
    pass
