"""The reply partition in which this gateway's requests are answered: claimed, kept, and where it is lost claimed again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from holdfast.errors import ConfigurationError, NotAccepted, Unavailable
from services.gateway.claim import Claim, Claims
from services.gateway.readiness import Readiness
from services.gateway.streams import Streams
from services.gateway.tails import Tails

NEED = "reply partition"
"""What readiness calls it."""

AGAIN_SECONDS = 1.0
"""After all were taken, where there had been a claim."""

log = structlog.get_logger(__name__)


class Home:
    """A gateway's own reply partition. One that is lost is read on for as long as it has open streams; new requests wait for
    the next one."""

    def __init__(self, claims: Claims, tails: Tails, readiness: Readiness) -> None:
        self._claims = claims
        self._tails = tails
        self._readiness = readiness
        self._partition: int | None = None

    @asynccontextmanager
    async def streams(self) -> AsyncIterator[Streams]:
        """Its streams, read while the block runs.

        Raises:
            NotAccepted: there is no partition now.
        """
        if self._partition is None:
            raise NotAccepted(f"the {NEED} is missing: {self._readiness.missing[NEED]}")
        async with self._tails.of(self._partition) as streams:
            yield streams

    async def run(self) -> None:
        """Until cancelled. A log that cannot be asked is asked again.

        Raises:
            ConfigurationError: there was no claim to be had, and never had been one.
        """
        claimed = False
        while True:
            try:
                async with self._claims.claimed() as claim:
                    claimed = True
                    await self._live_in(claim)
            except (ConfigurationError, Unavailable) as error:
                if isinstance(error, ConfigurationError) and not claimed:
                    raise
                await self._lost(str(error))
                await asyncio.sleep(error.retry_after if isinstance(error, Unavailable) else AGAIN_SECONDS)

    async def _live_in(self, claim: Claim) -> None:
        """Returns when the claim is lost and readiness knows of it: leaving the group, after that, may take the log a while."""
        async with self._tails.of(claim.partition) as streams:
            await streams.began()
            log.info("claimed", reply_partition=claim.partition)
            self._partition = claim.partition
            try:
                await self._readiness.found(NEED)
                while claim.holds:
                    await claim.change()
                await self._lost(f"another gateway has taken number {claim.partition}")
            except Unavailable as error:
                await self._lost(str(error))
                raise
            finally:
                self._partition = None

    async def _lost(self, reason: str) -> None:
        if self._readiness.missing.get(NEED) != reason:  # it is news
            log.warning("no reply partition", reason=reason)
        await self._readiness.lost(NEED, reason)
