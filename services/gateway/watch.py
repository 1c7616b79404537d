"""Whether the log is there, and engines behind it, and what waits for them. Who dies says nothing, so the log is asked again
and again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from holdfast.bus import Bus, TopicPartition
from holdfast.errors import Unavailable
from holdfast.topics import ENGINES, GROUPS, REQUESTS, Topic
from holdfast.v1.generation_pb2 import RequestClass
from services.gateway.backlog import Backlog
from services.gateway.readiness import NOT_YET, Readiness
from services.gateway.turnover import Standing

log = structlog.get_logger(__name__)

NO_ENGINE = "no engine takes requests from the log; those that are accepted wait for one"


Members = Mapping[str, frozenset[TopicPartition]]
"""Of a group, each with what it owns."""


class Watch:
    """Tells readiness of `log` and `engine`: a request needs the log to be accepted, and an engine to be answered. Tells each
    class's backlog how the log stands."""

    def __init__(
        self,
        bus: Bus,
        readiness: Readiness,
        backlogs: Mapping[RequestClass.ValueType, Backlog],
        *,
        every: float,
        seconds: float,
    ) -> None:
        """`every`: seconds between two looks. `seconds`: how long the log may take for one."""
        self._bus = bus
        self._readiness = readiness
        self._backlogs = backlogs
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
                engines = await self._bus.group_members(ENGINES)
        except TimeoutError:
            await self._lost("log", f"it did not answer within {self._seconds:g} seconds")
        except Unavailable as error:
            await self._lost("log", str(error))
        else:
            await self._found("log")
            await (self._found("engine") if engines else self._lost("engine", NO_ENGINE))
            await self._ask_what_waits({ENGINES: engines})

    async def _ask_what_waits(self, members: dict[str, Members]) -> None:
        """Where a part of the log does not say, the rest still takes requests: what was known before has to do. `members`: of
        groups that were asked for already."""
        try:
            async with asyncio.timeout(self._seconds):
                for request_class, backlog in self._backlogs.items():
                    group = GROUPS[request_class]
                    if group not in members:
                        members[group] = await self._bus.group_members(group)
                    await self._ask(REQUESTS[request_class], group, members[group], backlog)
        except TimeoutError:
            log.warning("the log does not say what waits", reason=f"no answer within {self._seconds:g} seconds")
        except Unavailable as error:
            log.warning("the log does not say what waits", reason=str(error))

    async def _ask(self, topic: Topic, group: str, members: Members, backlog: Backlog) -> None:
        told = backlog.ask()
        owners = {partition: member for member, owned in members.items() for partition in owned}
        lag = await self._bus.lag(group, [topic])
        standings = [Standing.of(lag[partition], owners.get(partition)) for partition in topic.partitions]
        told(standings, bool(members), asyncio.get_running_loop().time())

    async def _lost(self, need: str, reason: str) -> None:
        if self._readiness.missing.get(need, NOT_YET) == NOT_YET:  # it is news
            log.warning("missing", need=need, reason=reason)
        await self._readiness.lost(need, reason)

    async def _found(self, need: str) -> None:
        if need in self._readiness.missing:
            log.info("found", need=need)
            await self._readiness.found(need)
