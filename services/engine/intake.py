"""From the log to the scheduler: which requests this engine takes, and when it lets go of them.

It is a member of two groups, one for each request topic, so that interactive requests can be asked for first. It takes
as many records as it has slots: what it does not take another engine could start. Since both groups are read at once,
the slots that either may have are filled one by one, and at most one record is taken beyond them; apart from that, only
interactive requests that take the slots of batch ones make it hold more. A tenth of the slots goes to interactive requests
only while the log has no batch request to give. A record that cannot be honoured is answered
with the reason; one that is no request at all is logged and passed over.

A rebalance gives and takes partitions. What is kept goes on (its records come again and are known by their
offsets); what is lost is dropped without another word: the new owner answers now. A request that another engine may have
begun waits until it is known how far that came (`takeover`), and one of which an engine may have died until no other such
is on trial (`starts`); those behind it do not. One of which too many may have died is given up (`dead`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
from google.protobuf.message import DecodeError

from holdfast import topics
from holdfast.accept import Place
from holdfast.bus import NOTHING_OWNED, Bus, Member, Ownership, Position, Reader, Record, TopicPartition
from holdfast.errors import AlreadyExists, HoldfastError, NotOwner, RequestError, StreamFailed, Unavailable
from holdfast.ownership import Accepted, Standing
from holdfast.records import accepted_at_of
from holdfast.topics import Topic
from holdfast.v1 import generation_pb2 as pb
from services.engine import cancels
from services.engine.cancels import Cancels
from services.engine.commits import Commits
from services.engine.dead import DeadLetters
from services.engine.emit import Emitter
from services.engine.metrics import EngineMetrics
from services.engine.requests import Request, Requests
from services.engine.sequence import FinishReason, Sequence
from services.engine.starts import Starts
from services.engine.takeover import Takeover
from services.engine.validation import MAX_CHOICES, Served, deadline_of, sequences_of

COMMIT_SECONDS = 1.0
"""How long a request that is done may wait for its commit."""

FAREWELL_SECONDS = 2.0
"""How long an engine that leaves may take to say that it did not die of what it leaves."""

log = structlog.get_logger(__name__)


class Steps(Protocol):
    """The step thread's door for sequences."""

    def add(self, sequences: Iterable[Sequence]) -> None: ...
    def cancel(self, sequences: Iterable[Sequence]) -> None: ...
    def let_go(self, sequences: Collection[Sequence], *, gone: Callable[[], None]) -> None: ...


@dataclass(slots=True, eq=False)
class _Side:
    """One of the two groups."""

    topic: Topic
    group: str
    interactive: bool
    member: Member
    ownership: Ownership = NOTHING_OWNED
    """What was owned when it was last looked at."""
    num_asked: int = 0
    """How many records the read under way may return."""
    reading: asyncio.Timeout | None = None
    """Ends the read under way."""

    def interrupt(self) -> None:
        """Has the read under way return now, with nothing. A read that is cancelled takes no record."""
        if self.reading is not None and not self.reading.expired():
            self.reading.reschedule(asyncio.get_running_loop().time())


class Intake:
    """What takes requests. Lives in the event loop."""

    def __init__(
        self,
        bus: Bus,
        requests: Requests,
        emitter: Emitter,
        steps: Steps,
        *,
        served: Served,
        commits: Commits,
        takeover: Takeover,
        dead_letters: DeadLetters,
        metrics: EngineMetrics,
        max_sequences: int,
        batch_share: int,
        incarnation: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`batch_share`: slots that batch requests hold against interactive ones, which may take all others from them."""
        self._bus = bus
        self._requests = requests
        self._emitter = emitter
        self._steps = steps
        self._served = served
        self._commits = commits
        self._takeover = takeover
        self._starts = Starts(emitter, begin=self._begin)
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._max_sequences = max_sequences
        self._batch_share = batch_share
        self._incarnation = incarnation
        self._clock = clock
        self._sides: list[_Side] = []
        self._cancels = Cancels()
        self.is_draining = False
        self._joined = asyncio.Event()
        self._drained = asyncio.Event()
        self._left = asyncio.Event()
        self._farewells: set[asyncio.Future[None]] = set()
        requests.when_fewer = self._look_for_room
        requests.when_proven = self._starts.over
        requests.when_done = self._done

    async def run(self) -> None:
        """Takes requests; returns once it was drained, when the groups are left.

        Raises:
            Unavailable: the log cannot be read any more.
        """
        async with (
            self._informed() as control,
            self._join(topics.REQUESTS_INTERACTIVE, topics.ENGINES, interactive=True) as interactive,
            self._join(topics.REQUESTS_BATCH, topics.ENGINES_BATCH, interactive=False) as batch,
            asyncio.TaskGroup() as tasks,
        ):
            beside = [tasks.create_task(each) for each in (self._hear_on(control), self._starts.run())]
            async with asyncio.TaskGroup() as until_drained:
                until_drained.create_task(self._read(interactive))
                until_drained.create_task(self._read(batch))
                until_drained.create_task(self._commit_regularly())
            for task in beside:
                task.cancel()
        self._left.set()

    async def until_joined(self) -> None:
        """Returns once both groups have given this engine its share."""
        await self._joined.wait()

    async def drain(self) -> None:
        """Takes no more requests; returns when those taken are answered and the groups are left. May be called again,
        and by several."""
        self.is_draining = True
        for side in self._sides:
            side.interrupt()
        await self._requests.until_empty()
        self._drained.set()
        self._commits.changed.set()
        for side in self._sides:
            side.interrupt()
        await self._left.wait()

    async def leave_rest(self) -> None:
        """Leaves what was taken to other engines. They should not think that this one died of it, so it says that, as
        long as the log and the device answer within `FAREWELL_SECONDS`."""
        await self.commit()
        self._lose([partition for side in self._sides for partition in side.ownership.partitions])
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=FAREWELL_SECONDS)

    async def commit(self) -> None:
        """Commits what is due. What fails is due again."""
        due = self._commits.due()
        for side in self._sides:
            positions = {each: position for each, position in due.items() if each.topic == side.topic.name}
            if not positions:
                continue
            try:
                await side.member.commit(positions)
            except NotOwner as error:
                log.info("not committed: the group moves", group=side.group, error=str(error))
                self._commits.changed.set()
            except Unavailable as error:
                log.warning("not committed", group=side.group, error=str(error))
                self._commits.changed.set()
            else:
                self._commits.committed(positions)

    # The groups.

    @asynccontextmanager
    async def _join(self, topic: Topic, group: str, *, interactive: bool) -> AsyncIterator[_Side]:
        async with self._bus.join(group, [topic], incarnation=self._incarnation) as member:
            side = _Side(topic, group, interactive, member)
            self._sides.append(side)
            try:
                yield side
            finally:
                self._sides.remove(side)

    async def _read(self, side: _Side) -> None:
        while not self._drained.is_set():
            records = await self._next(side)
            await self._meet(side)
            for record in records:
                self._take(record, interactive=side.interactive)

    async def _next(self, side: _Side) -> list[Record]:
        """The next records, as many as there is room for. Returns without any when the group moves, when there is
        room for the first time, or when the engine is drained."""
        side.num_asked = self._room(side)
        if side.num_asked and not side.interactive:
            asyncio.get_running_loop().call_soon(self._look_for_room)  # once the read waits
        try:
            async with asyncio.timeout(None) as side.reading:
                return await side.member.read(max_records=side.num_asked)
        except TimeoutError:
            return []
        finally:
            side.reading = None

    def _room(self, side: _Side) -> int:
        """How many records a read may return, whatever the other side's read returns meanwhile; or one, where there is
        a slot now that both may take."""
        if self.is_draining:
            return 0
        free = self._max_sequences - self._requests.num_open(interactive=True)
        shared = min(1, free - self._requests.num_open(interactive=False))
        if side.interactive:
            return max(0, free - self._batch_share, shared if self._batch_has_none() else 0)
        return max(0, shared)

    def _batch_has_none(self) -> bool:
        """Whether the log was asked for a batch request and has not given one: else its share would be filled with the
        interactive requests that always wait."""
        return any(not side.interactive and side.num_asked and side.reading is not None for side in self._sides)

    def _look_for_room(self) -> None:
        for side in self._sides:
            if side.num_asked == 0 and self._room(side):
                side.interrupt()

    async def _meet(self, side: _Side) -> None:
        """Looks whether the group gave or took partitions."""
        before, now = side.ownership, side.member.ownership
        if now is before:
            return
        kept = now.kept_since(before)
        self._lose(before.partitions - kept)
        side.ownership = now
        for partition in now.partitions - kept:
            self._takeover.gain(partition, now.epoch)
        committed = await self._committed(side)
        for partition in now.partitions - kept:
            self._commits.gain(partition, committed.get(partition))
        log.info("partitions", group=side.group, owned=len(now.partitions), kept=len(kept), epoch=now.epoch)
        if all(each.ownership is not NOTHING_OWNED for each in self._sides):
            self._joined.set()

    async def _committed(self, side: _Side) -> dict[TopicPartition, Position]:
        try:
            return await side.member.committed()
        except Unavailable as error:
            log.warning("requests that were answered may be answered again", group=side.group, error=str(error))
            return {}

    def _lose(self, partitions: Collection[TopicPartition]) -> None:
        """Another engine answers their requests now."""
        self._takeover.lose(partitions)
        self._commits.lose(partitions)
        dropped = self._requests.drop(partitions)
        for request in dropped:
            log.info("request left to another engine", request_id=request.request_id)
            self._starts.over(request)
        if announced := [each for each in dropped if each.begun_at]:
            self._let_go(announced)

    def _let_go(self, requests: list[Request]) -> None:
        """Has the step thread let go of them, and then says that this engine did not die of them."""
        said: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._farewells.add(said)
        said.add_done_callback(self._farewells.discard)
        sequences = [sequence for each in requests if each.has_begun for sequence in each.sequences]
        gone = partial(self._emitter.let_go, requests, confirmed=lambda: said.set_result(None))
        self._steps.let_go(sequences, gone=gone)

    def leave(self, partition: TopicPartition) -> None:
        """A later owner has written for this partition: the group has moved, and tells us later."""
        self._lose([partition])

    async def _commit_regularly(self) -> None:
        while not self._drained.is_set():
            await self._commits.changed.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self._drained.wait()
            self._commits.changed.clear()
            await self.commit()
        await self.commit()  # what settled while the commit before was under way

    # Records.

    def _take(self, record: Record, *, interactive: bool) -> None:
        """Takes one request, or answers why not. A record that was taken before is passed over."""
        source = record.topic_partition
        if self._takeover.epoch_of(source) is None or not self._commits.begin(source, record.offset):
            return
        message = self._readable(record)
        if message is None:
            log.warning("record passed over", source=source, offset=record.offset)
            self._commits.finish(source, record.offset)
            return
        sequences, reason, error = self._sequences(message, record, interactive=interactive)
        request = Request(
            request_id=message.request_id,
            source=source,
            offset=record.offset,
            timestamp_ms=record.timestamp_ms,
            accepted_at=accepted_at_of(message),
            headers=record.headers,
            reply_partition=message.reply_partition,
            interactive=interactive,
            num_choices=min(max(message.num_choices, 1), MAX_CHOICES),
            sequences=sequences,
        )
        self._requests.add(request)
        start = Place(message.reply_start_offset, message.reply_start_epoch)
        accepted = Accepted(request.request_id, request.reply_partition, start, request.num_choices)
        request.claim = self._takeover.ask(source, accepted, partial(self._answer, request, message, reason, error))

    def _answer(
        self,
        request: Request,
        message: pb.GenerationRequest,
        reason: FinishReason | None,
        error: HoldfastError | None,
        standing: Standing,
    ) -> None:
        """What other engines told of a request is known now: it goes on from there, or ends there for a reason."""
        for choice, each in enumerate(standing.choices):
            request.prefixes[choice] = each.prefix
            if each.has_ended:
                self._requests.told(request, choice)
                self._requests.settle(request, choice)
        if standing.contradiction:
            reason, error = FinishReason.ERROR, StreamFailed(f"nobody can go on: {standing.contradiction}")
        if reason is not None:
            log.info("request refused", request_id=request.request_id, reason=reason.value, error=str(error or ""))
            self._emitter.refuse(request, reason, error)
            return
        if standing.is_exhausted:
            self._dead_letters.put(request, message, standing)
            return
        for sequence in request.sequences:
            sequence.go_on_after(standing.choices[sequence.choice].token_ids)
        full = [each.choice for each in request.sequences if each.choice in request.open and each.is_full]
        self._emitter.refuse(request, FinishReason.LENGTH, choices=full)
        if request.open:
            self._starts.put(request, standing)

    def _begin(self, request: Request) -> None:
        """The scheduler takes what is open of the request: nothing, where it was dropped meanwhile."""
        request.has_begun = True
        cancelled = [choice for choice in sorted(request.open) if self._was_cancelled(request, choice)]
        self._emitter.refuse(request, FinishReason.CANCELLED, choices=cancelled)
        sequences = [each for each in request.sequences if each.choice in request.open]
        if sequences and request.sequences[0] is not sequences[0]:
            for each in sequences:
                each.shares_prompt_with = None
        self._metrics.resumed(sequences)
        self._steps.add(sequences)

    def _done(self, request: Request) -> None:
        """The log has the request's last answer."""
        self._takeover.forget(request.source, request.claim)
        self._starts.over(request)

    def _readable(self, record: Record) -> pb.GenerationRequest | None:
        """The request in a record; None where there is none, or nowhere to answer it."""
        try:
            message = pb.GenerationRequest.FromString(record.value)
        except DecodeError:
            message = pb.GenerationRequest()
        if message.request_id and message.reply_partition < topics.TOKENS.num_partitions:
            return message
        self._metrics.unreadable_records.inc()
        return None

    def _sequences(
        self, message: pb.GenerationRequest, record: Record, *, interactive: bool
    ) -> tuple[tuple[Sequence, ...], FinishReason | None, HoldfastError | None]:
        """A request's sequences, or why there are none."""
        if self._requests.running(message.request_id) is not None:
            error = AlreadyExists(f"a request with the id {message.request_id} runs; choose another, or none")
            return (), FinishReason.ERROR, error
        accepted_at = accepted_at_of(message)
        if self._cancels.mean(message.request_id, None, accepted_at=accepted_at, written_ms=record.timestamp_ms):
            return (), FinishReason.CANCELLED, None
        deadline = deadline_of(message)
        if deadline is not None and deadline <= self._clock():
            return (), FinishReason.DEADLINE, None
        arrival = record.timestamp_ms / 1000 if accepted_at is None else accepted_at / 1e9
        try:
            return sequences_of(message, self._served, interactive=interactive, arrival=arrival), None, None
        except RequestError as error:
            return (), FinishReason.ERROR, error

    # Cancellations.

    @asynccontextmanager
    async def _informed(self) -> AsyncIterator[Reader]:
        """The control topic, once the cancellations were heard that nobody was there for: the requests they are meant
        for may lie unread, or come again."""
        partition = topics.CONTROL.partition(0)
        missed = (await self._bus.kept(partition))[-cancels.MAX_CANCELS :]
        async with self._bus.reader({partition: missed.start}) as control:
            while control.position(partition) < missed.stop:
                await self._hear(control)
            yield control

    async def _hear_on(self, control: Reader) -> None:
        while True:
            await self._hear(control)

    async def _hear(self, control: Reader) -> None:
        for record in await control.read():
            try:
                self._cancel(pb.Cancel.FromString(record.value), record.timestamp_ms)
            except DecodeError:
                log.warning("record passed over", source=record.topic_partition)

    def _cancel(self, cancel: pb.Cancel, timestamp_ms: int) -> None:
        """Ends what runs and is meant, and remembers to do so where it is still to come."""
        self._cancels.hear(cancel, timestamp_ms)
        for request in self._requests.meant(cancel.request_id):
            if request.has_begun:
                self._steps.cancel([each for each in request.sequences if self._was_cancelled(request, each.choice)])

    def _was_cancelled(self, request: Request, choice: int) -> bool:
        return self._cancels.mean(
            request.request_id, choice, accepted_at=request.accepted_at, written_ms=request.timestamp_ms
        )
