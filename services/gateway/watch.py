"""Whether the log is there, and engines behind it. Who dies says nothing, so the log is asked again and again."""

from __future__ import annotations

import asyncio

import structlog

from holdfast.bus import Bus
from holdfast.errors import Unavailable
from holdfast.topics import ENGINES
from services.gateway.readiness import NOT_YET, Readiness

log = structlog.get_logger(__name__)

NO_ENGINE = "no engine takes requests from the log; those that are accepted wait for one"


class Watch:
    """Tells readiness of `log` and `engine`. A request needs the log to be accepted, and an engine to be answered."""

    def __init__(self, bus: Bus, readiness: Readiness, *, every: float, seconds: float) -> None:
        """`every`: seconds between two questions. `seconds`: how long the log may take to answer one."""
        self._bus = bus
        self._readiness = readiness
        self._every = every
        self._seconds = seconds

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(self._every)
            await self.look()

    async def look(self) -> None:
        """Asks once, and tells."""
        try:
            async with asyncio.timeout(self._seconds):
                num_engines = await self._bus.group_size(ENGINES)
        except TimeoutError:
            await self._lost("log", f"it did not answer within {self._seconds:g} seconds")
        except Unavailable as error:
            await self._lost("log", str(error))
        else:
            await self._found("log")
            await (self._found("engine") if num_engines else self._lost("engine", NO_ENGINE))

    async def _lost(self, need: str, reason: str) -> None:
        if self._readiness.missing.get(need, NOT_YET) == NOT_YET:  # it is news
            log.warning("missing", need=need, reason=reason)
        await self._readiness.lost(need, reason)

    async def _found(self, need: str) -> None:
        if need in self._readiness.missing:
            log.info("found", need=need)
            await self._readiness.found(need)
