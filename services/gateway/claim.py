"""Which reply partition is a gateway's own. Two that share one are right all the same, as readers know their requests by id;
but each then reads what both are told, so a partition is claimed.

A claim is membership: each reply partition has a group, over a topic of one partition, which belongs to one member at a
time. So a gateway that leaves gives its claim up at once, one that dies when the group throws it out, and one that froze
learns of its loss when it wakes.
"""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog

from holdfast.bus import Bus, Member
from holdfast.errors import ConfigurationError
from holdfast.topics import CONTROL, TOKENS, gateways_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """A reply partition, and the membership that claims it."""

    partition: int
    member: Member

    @property
    def holds(self) -> bool:
        """Whether the partition is this gateway's, as far as it knows."""
        return bool(self.member.ownership.partitions)

    async def change(self, *, timeout: float | None = None) -> None:
        """Returns when that may have changed. Somebody waits here as long as the claim is to be kept.

        Raises:
            Unavailable: the log refuses.
        """
        await self.member.read(max_records=0, timeout=timeout)


class Claims:
    """Claims a reply partition: the one that was named, or the first that is free."""

    def __init__(self, bus: Bus, *, named: int | None, seconds: float, host: str | None = None) -> None:
        """`named`: None for any. `seconds`: how long the one that was named may take to become free. `host`: where the
        gateway runs; partitions are looked at in an order of its own, so that it finds the one again that it had."""
        first = zlib.crc32((host or socket.gethostname()).encode())
        self._order = [(first + index) % TOKENS.num_partitions for index in range(TOKENS.num_partitions)]
        self._bus = bus
        self._named = named
        self._seconds = seconds

    @asynccontextmanager
    async def claimed(self) -> AsyncIterator[Claim]:
        """A claim that holds at first, given up with the block.

        Raises:
            ConfigurationError: another gateway has the partition, or others have all.
            Unavailable: the log cannot be reached.
        """
        async with AsyncExitStack() as stack:
            if self._named is None:
                yield await self._first_free(stack)
            else:
                yield await self._the_named(self._named, stack)

    async def _the_named(self, partition: int, stack: AsyncExitStack) -> Claim:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._seconds
        claim = await stack.enter_async_context(self._joined(partition))
        if not claim.holds:
            log.info("waiting for another gateway to give its claim up", reply_partition=partition)
        while not claim.holds:
            if (left := until - loop.time()) <= 0:
                raise ConfigurationError(
                    f"reply_partition is {partition}, which another gateway has, and kept for {self._seconds:g} seconds: "
                    f"each needs one of its own; without the setting it takes one that is free"
                )
            await claim.change(timeout=left)
        return claim

    async def _first_free(self, stack: AsyncExitStack) -> Claim:
        for partition in self._order:
            if await self._bus.group_members(gateways_of(partition)):
                continue
            async with AsyncExitStack() as attempt:
                claim = await attempt.enter_async_context(self._joined(partition))
                if claim.holds:  # and nobody else was faster
                    stack.push_async_exit(attempt.pop_all())
                    return claim
        raise ConfigurationError(f"other gateways have all {TOKENS.num_partitions} reply partitions")

    @asynccontextmanager
    async def _joined(self, partition: int) -> AsyncIterator[Claim]:
        async with self._bus.join(gateways_of(partition), [CONTROL]) as member:
            await member.read(max_records=0)
            yield Claim(partition, member)
