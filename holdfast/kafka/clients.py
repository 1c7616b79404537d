"""aiokafka's clients, mended where they need it, and started and stopped as a whole.

* On uvloop a connection that has just broken says RuntimeError, which no client expects, and a consumer never recovers
  from (aio-libs/aiokafka#1038); so connections here say what they expect.
* While partitions have no leader, and be it because their only broker is away, producers and consumers ask for metadata
  without a pause, two thousand times a second; so clients here pause between two questions, as Kafka's own do.
* Cancelled in the middle of starting or stopping, they leave sockets open and fetches running; so both go on to the end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import aiokafka
from aiokafka import conn, errors
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin import client as admin_client
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer import consumer
from aiokafka.producer import producer

from holdfast.errors import Unavailable

START_SECONDS: Final = 10.0
"""How long a broker may take to answer a client that starts."""

METADATA_SECONDS: Final = 0.1
"""From one question about metadata to the next, at least: `retry.backoff.ms` of Kafka's own clients."""


class Connection(conn.AIOKafkaConnection):  # type: ignore[misc] # aiokafka has no types
    """Takes a transport that is closed for a connection that is broken, as every kind of it is."""

    def send(self, request: Any, expect_response: bool = True) -> Any:
        try:
            return super().send(request, expect_response)
        except RuntimeError as error:
            self.close(reason=conn.CloseReason.CONNECTION_BROKEN)
            raise errors.KafkaConnectionError(f"Connection at {self.host}:{self.port} broken: {error}") from error


class Client(AIOKafkaClient):  # type: ignore[misc]
    """Asks for metadata once in `METADATA_SECONDS`, however often it is told to."""

    _asked_at = -math.inf

    async def _metadata_update(self, *where: Any) -> bool:
        now = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._asked_at + METADATA_SECONDS - now()))
        self._asked_at = now()
        return bool(await super()._metadata_update(*where))


# aiokafka makes them by these names, and has no other way to be told.
conn.AIOKafkaConnection = Connection
for _module in (admin_client, consumer, producer):
    _module.AIOKafkaClient = Client


@asynccontextmanager
async def started(consumer: aiokafka.AIOKafkaConsumer, bootstrap: str) -> AsyncIterator[None]:
    try:
        with reported(f"no Kafka broker answers at {bootstrap}"):
            await start(consumer)
        yield
    finally:
        await stop(consumer)


async def start(client: aiokafka.AIOKafkaConsumer | aiokafka.AIOKafkaProducer | AIOKafkaAdminClient) -> None:
    """Raises TimeoutError after START_SECONDS. Cancelled while it asks its first broker for the others, a client would
    forget that connection with its socket open."""

    async def start() -> None:
        async with asyncio.timeout(START_SECONDS):
            await client.start()

    await _to_the_end(start())


async def stop(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """Leaves the group and closes the connections. Half stopped, a consumer would fetch on, and its group would wait for
    it."""
    await _to_the_end(_stop_all(consumer))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Does the work to its end even where the caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _stop_all(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """aiokafka cancels its fetches one by one, and where one did not run yet, or waits for a broker which is away, lets
    the cancellation out as if it were ours: with the others still running, and its connections still open."""
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        fetches = set(consumer._fetcher._pending_tasks) if consumer._fetcher else set()
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        await consumer._client.close()


@contextmanager
def reported(failure: str) -> Iterator[None]:
    """What aiokafka raises becomes Unavailable."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable(f"{failure}: out of time") from error
    except (errors.KafkaError, OSError) as error:
        raise Unavailable(f"{failure}: {error!r}") from error
