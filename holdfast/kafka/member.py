"""What reads as a member of a group.

* aiokafka's consumers rebalance in the background. A commit on its way while the group gets a new generation is answered
  with an error that makes aiokafka leave the group; so commits and rebalances exclude each other here.
* Only a listener learns of a rebalance, and only private fields tell its generation and member id. They are read at one
  place, `KafkaMember.on_partitions_assigned`.
* A member that is not inside `getmany` for five minutes leaves the group; so a read of no records waits in `getmany`,
  for a partition that no log has.
* Its sticky assignor keeps its state in the class, for all consumers of a process; so every member has its own class.
* A consumer takes a coordinator that is not ready for one that knows no commits, and goes to the beginning; so members
  are sent to their positions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import aiokafka
import structlog
from aiokafka import errors
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from holdfast.bus import NOTHING_OWNED, Ownership, Position, Record, TopicPartition, check_commit
from holdfast.errors import NotOwner, Unavailable
from holdfast.kafka.clients import reported
from holdfast.kafka.names import Names
from holdfast.kafka.reader import deadline_in, left_ms

log = structlog.get_logger(__name__)

COMMIT_SECONDS: Final = 5.0
"""How long a commit may take; less than the rebalance timeout, which it can hold up."""

RETRY_SECONDS: Final = 0.5
"""The pause after a question about positions that the log did not answer in its time."""

GRACE_SECONDS: Final = 0.1
"""How much longer than asked a read may take, when its timeout ends in the middle of a rebalance."""

_NOWHERE: Final = aiokafka.TopicPartition("", 0)


class KafkaMember(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A `Member` of a group on a `KafkaBus`.

    A rebalance begins with `on_partitions_revoked` and ends with `on_partitions_assigned`, both called by the consumer's
    background task. Between them nothing is read (aiokafka sees to that) and nothing is committed.
    """

    def __init__(
        self,
        group: str,
        consumer: aiokafka.AIOKafkaConsumer,
        names: Names,
        assignor: type[StickyPartitionAssignor],
        incarnation: int,
        *,
        committed: Callable[[Iterable[TopicPartition]], Awaitable[dict[TopicPartition, Position]]],
    ) -> None:
        """`committed`: what the group has committed in partitions."""
        self._group = group
        self._consumer = consumer
        self._names = names
        self._assignor = assignor
        self._incarnation = incarnation
        self._committed = committed
        self._ownership = NOTHING_OWNED
        self._met = NOTHING_OWNED  # the ownership that held when `read` last returned
        self._commits = asyncio.Lock()  # held by a commit, or by a rebalance
        self._taking: asyncio.Timeout | None = None  # what the end of a rebalance interrupts

    @property
    def ownership(self) -> Ownership:
        return self._ownership

    async def read(self, *, max_records: int, timeout: float | None = None) -> list[Record]:
        deadline = deadline_in(timeout)
        while True:
            if self._met is not (ownership := self._ownership):
                await self._go_to_committed(ownership)
                self._met = ownership
                return []
            records = await self._take(max_records, deadline)
            if records or (left_ms(deadline) == 0 and self._met is self._ownership):
                return records

    async def commit(self, positions: Mapping[TopicPartition, Position]) -> None:
        theirs = {self._names.theirs(p): aiokafka.OffsetAndMetadata(*position) for p, position in positions.items()}
        with reported(f"group {self._group} cannot commit"):
            async with asyncio.timeout(COMMIT_SECONDS), self._commits:
                check_commit(positions, met=self._met, current=self._ownership)
                try:
                    await self._consumer.commit(theirs)
                except (errors.CommitFailedError, errors.IllegalStateError) as error:
                    raise NotOwner(f"group {self._group} went on without this member") from error

    async def committed(self) -> dict[TopicPartition, Position]:
        return await self._committed(self._ownership.partitions)

    async def on_partitions_revoked(self, revoked: object) -> None:
        """A rebalance begins. Called by aiokafka; the group waits for this member until it returns."""
        await self._commits.acquire()

    def on_partitions_assigned(self, assigned: Iterable[aiokafka.TopicPartition]) -> None:
        """A rebalance ends. Called by aiokafka, before the first record of what is owned now can be read."""
        coordinator = self._consumer._coordinator
        self._assignor.on_generation_assignment(coordinator.generation)
        self._ownership = Ownership(
            frozenset(map(self._names.ours, assigned)), coordinator.generation, coordinator.member_id, self._incarnation
        )
        self._commits.release()
        # A `_take` that waits ends. Even one that is about to get records loses none: cancelled, it takes nothing.
        if self._taking is not None and not self._taking.expired():
            self._taking.reschedule(asyncio.get_running_loop().time())

    async def _go_to_committed(self, ownership: Ownership) -> None:
        """Reads from the committed positions on, once the log says them. Where there is none, aiokafka goes to the beginning."""
        while ownership is self._ownership:
            try:
                committed = await self._committed(ownership.partitions)
            except Unavailable as error:
                log.warning("reading waits for the log", group=self._group, error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if ownership is self._ownership:
                for partition, position in committed.items():
                    self._consumer.seek(self._names.theirs(partition), position.offset)
            return

    async def _take(self, max_records: int, deadline: float | None) -> list[Record]:
        """Records of what is owned; [] at the deadline, or because a rebalance ended."""
        where = () if max_records else (_NOWHERE,)
        try:
            async with asyncio.timeout_at(deadline and deadline + GRACE_SECONDS) as self._taking:
                batches = await self._consumer.getmany(
                    *where, timeout_ms=left_ms(deadline), max_records=max_records or None
                )
        except TimeoutError:
            return []
        except errors.KafkaError as error:
            if not error.retriable:
                raise Unavailable(f"group {self._group} cannot be read: {error!r}") from error
            log.warning("reading goes on", group=self._group, error=repr(error))
            return []
        finally:
            self._taking = None
        return self._names.records(batches)


def own_assignor() -> type[StickyPartitionAssignor]:
    """A class of its own: aiokafka's keeps what a member owned in class attributes."""
    return type("OwnStickyPartitionAssignor", (StickyPartitionAssignor,), {})
