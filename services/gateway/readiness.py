"""Whether this gateway can serve: what it needs, what of that is missing, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from holdfast.errors import NotAccepted, Unavailable

NOT_YET = "it was not seen yet"


class Readiness:
    """Ready while nothing that the gateway needs is missing. The log is missing until it was read from and whenever it
    cannot be, or does not answer; the tokenizer while there is no call to it; an engine until one was seen and whenever
    none is there."""

    def __init__(self, needs: Iterable[str]) -> None:
        self._missing = dict.fromkeys(needs, NOT_YET)
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[bool], Awaitable[None]]] = []

    @property
    def missing(self) -> dict[str, str]:
        """What is missing, and why; empty where the gateway can serve."""
        return dict(self._missing)

    def check(self, need: str) -> None:
        """Raises Unavailable where this is missing: NotAccepted while the gateway starts."""
        if need in self._missing:
            reason = self._missing[need]
            raise (NotAccepted if reason == NOT_YET else Unavailable)(f"the {need} is missing: {reason}")

    async def found(self, need: str) -> None:
        """This is there."""
        self._missing.pop(need, None)
        await self._tell()

    async def lost(self, need: str, reason: str) -> None:
        """This is not there."""
        self._missing[need] = reason
        await self._tell()

    async def tell(self, listener: Callable[[bool], Awaitable[None]]) -> None:
        """Has the listener told now, and whenever it may have changed, whether the gateway is ready."""
        self._listeners.append(listener)
        await listener(not self._missing)

    async def wait(self, *needs: str) -> None:
        """Until none of these is missing."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._missing.keys().isdisjoint(needs))

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
        for listener in self._listeners:
            await listener(not self._missing)
