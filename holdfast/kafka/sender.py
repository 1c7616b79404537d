"""What sends to the log.

* An idempotent send is repeated for ever, and a failed one leaves a gap in the sequence numbers that fails all later
  ones; so acks have a time limit here, and a producer is replaced after any failure.
* A full batch lets later sends overtake those that wait; so sends to one partition take turns.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import aiokafka
from aiokafka import errors

from holdfast.bus import Headers, TopicPartition
from holdfast.errors import Unavailable
from holdfast.kafka.clients import reported, start
from holdfast.kafka.names import Names


class Sender:
    """Sends to the log through an idempotent producer, and replaces that after a failure. Entered before the first send;
    leaving waits for outstanding acks as long as one may take, then fails them."""

    def __init__(self, new_producer: Callable[[], aiokafka.AIOKafkaProducer], names: Names, timeout: float) -> None:
        self._new_producer = new_producer
        self._names = names
        self._timeout = timeout
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._failed = False
        self._replacing = asyncio.Lock()
        self._turns: defaultdict[TopicPartition, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._replacing:
            await self._close()

    async def send(
        self, partition: TopicPartition, value: bytes, *, key: bytes | None, headers: Headers
    ) -> asyncio.Future[int]:
        """As `Bus.send`."""
        topic, number = self._names.theirs(partition)
        with reported(f"{partition.topic}[{partition.partition}] takes no record"):
            async with asyncio.timeout(self._timeout), self._turns[partition]:
                producer = await self._working_producer()
                try:
                    sent = await producer.send(topic, value, key=key, partition=number, headers=list(headers))
                except errors.KafkaTimeoutError:
                    raise  # the buffer is full; the producer is well
                except errors.KafkaError:
                    self._give_up(producer)
                    raise
        return self._acked(producer, sent, partition)

    async def _working_producer(self) -> aiokafka.AIOKafkaProducer:
        async with self._replacing:
            if self._failed:
                await self._close()
            if self._producer is None:
                self._producer = self._new_producer()
                try:
                    await start(self._producer)
                except BaseException:
                    await self._close()
                    raise
            return self._producer

    def _give_up(self, producer: aiokafka.AIOKafkaProducer) -> None:
        """The next send gets a new producer. What this one still holds will fail, or is there."""
        if producer is self._producer:
            self._failed = True

    async def _close(self) -> None:
        producer, self._producer, self._failed = self._producer, None, False
        if producer is None:
            return
        # `stop` waits until everything is sent, for ever if no broker comes back; it gives up when its sender task ends.
        sender = producer._sender.sender_task
        limit = asyncio.get_running_loop().call_later(self._timeout, sender.cancel) if sender is not None else None
        try:
            await producer.stop()
        finally:
            if limit is not None:
                limit.cancel()
            # Whoever still waits for an ack of it.
            producer._message_accumulator.fail_all(errors.ProducerClosed())

    def _acked(
        self, producer: aiokafka.AIOKafkaProducer, sent: asyncio.Future[Any], partition: TopicPartition
    ) -> asyncio.Future[int]:
        """A future of the offset that fails after the send timeout: the producer itself would repeat for ever."""
        loop = asyncio.get_running_loop()
        acked: asyncio.Future[int] = loop.create_future()
        where = f"{partition.topic}[{partition.partition}]"

        def expire() -> None:
            if not acked.done():
                acked.set_exception(
                    Unavailable(f"{where} gave no ack within {self._timeout} s; it may have the record")
                )

        def settle(sent: asyncio.Future[Any]) -> None:
            limit.cancel()
            error = sent.exception()
            if error is not None:
                self._give_up(producer)
            if acked.done():
                return
            if error is not None:
                failure = Unavailable(f"{where} gave no ack: {error!r}; it may have the record")
                failure.__cause__ = error
                acked.set_exception(failure)
            elif sent.result().offset < 0:
                acked.set_exception(Unavailable(f"{where} has the record, but does not say where"))
            else:
                acked.set_result(sent.result().offset)

        limit = loop.call_later(self._timeout, expire)
        sent.add_done_callback(settle)
        acked.add_done_callback(_seen)
        return acked


def _seen(acked: asyncio.Future[int]) -> None:
    """Who sent many records may stop at the first that failed: what became of the others is no news."""
    if not acked.cancelled():
        acked.exception()
