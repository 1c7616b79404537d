"""From the news of a step to records of the token topic, and from their acks to requests that are done.

One record for each (reply partition, source partition) and step. Records of one reply partition are sent in order, each
kept until the log has confirmed it; where one fails, it and all after it are sent again, in order: readers ignore what
they know (`holdfast.accept`), but would end a stream that has a hole. No reply partition waits for another. A request is
done, and may be committed, when the record with its last token is confirmed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import structlog
from opentelemetry import trace

from holdfast import topics
from holdfast.bus import Bus, TopicPartition
from holdfast.errors import HoldfastError, InternalError, InvalidRequest, Unavailable, wire
from holdfast.records import source_of, source_to_wire
from holdfast.v1 import generation_pb2 as pb
from services.engine.metrics import EngineMetrics
from services.engine.requests import Request, Requests
from services.engine.sequence import FinishReason, News, Sequence, TokenLogprobs
from services.engine.traces import trace_sequence

MAX_STREAMS = 512
"""Most streams in one record: with 20 log-probabilities each that is far below what the log takes."""

RETRY_SECONDS = 0.5
"""The pause before records that failed are sent again: time for the log to come back."""

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Delivery:
    """The records of one step."""

    num_records: int
    confirmed: Callable[[], None]
    """Called when the log has all of them."""

    def confirm_one(self) -> None:
        self.num_records -= 1
        if self.num_records == 0:
            self.confirmed()


@dataclass(slots=True)
class _Outgoing:
    """One record on its way."""

    source: TopicPartition
    value: bytes
    ends: list[tuple[Request, int]]
    """Choices that end with it."""
    proves: list[Request]
    """Suspects that it shows to be none."""
    is_farewell: bool
    """Whether it is to be said though the partition is another engine's."""
    delivery: _Delivery
    ack: asyncio.Future[int] | None = None

    @property
    def has_failed(self) -> bool:
        return self.ack is not None and self.ack.done() and self.ack.exception() is not None

    @property
    def is_confirmed(self) -> bool:
        return self.ack is not None and self.ack.done() and self.ack.exception() is None


@dataclass(slots=True)
class _Lane:
    """The records of one reply partition, in their order."""

    partition: TopicPartition
    unsent: deque[_Outgoing] = field(default_factory=deque)
    sent: deque[_Outgoing] = field(default_factory=deque)
    """Not confirmed yet."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is something to send, or an ack."""

    def confirmed(self) -> Iterator[_Outgoing]:
        """Takes out the leading ones that are confirmed."""
        while self.sent and self.sent[0].is_confirmed:
            yield self.sent.popleft()

    def go_back(self) -> int:
        """From the first that failed on all are to be sent again. Returns how many those are."""
        first = next((index for index, each in enumerate(self.sent) if each.has_failed), len(self.sent))
        failed = list(self.sent)[first:]
        self.unsent.extendleft(reversed(failed))
        for _ in failed:
            self.sent.pop()
        return len(failed)


class Emitter:
    """Sends what the engine has to tell. Lives in the event loop."""

    def __init__(
        self,
        bus: Bus,
        requests: Requests,
        *,
        engine: str,
        epoch_of: Callable[[TopicPartition], int | None],
        metrics: EngineMetrics,
        tracer: trace.Tracer,
    ) -> None:
        """`epoch_of` gives the epoch in which this engine owns a source partition, None where it does not."""
        self._bus = bus
        self._requests = requests
        self._engine = engine
        self._epoch_of = epoch_of
        self._metrics = metrics
        self._tracer = tracer
        self._lanes = [_Lane(partition) for partition in topics.TOKENS.partitions]

    def deliver(self, news: list[News], *, confirmed: Callable[[], None]) -> None:
        """The news of one step. `confirmed` is called once, when the log has all that is still to be told of them."""
        streams: _Streams = defaultdict(list)
        for each in news:
            request = self._requests.of(each.sequence)
            if request is not None:
                self._add(streams, request, each)
        self._put(streams, confirmed)

    def refuse(
        self,
        request: Request,
        reason: FinishReason,
        error: HoldfastError | None = None,
        *,
        choices: Iterable[int] | None = None,
    ) -> None:
        """Ends choices that get no sequence, all that have not ended if none are named: behind the tokens that they have."""
        streams: _Streams = defaultdict(list)
        for choice in sorted(request.unsettled) if choices is None else choices:
            prefix = request.prefixes[choice]
            finish = pb.Finish(reason=_REASONS[reason], usage=pb.Usage(completion_tokens=prefix.count))
            if error is not None:
                finish.error.CopyFrom(_error(error))
            stream = pb.StreamTokens(
                request_id=request.request_id,
                choice=choice,
                first_index=prefix.count,
                prefix_hash=prefix.hash,
                finish=finish,
            )
            streams[request.reply_partition, request.source].append((stream, request))
            self._metrics.refused(reason.value)
            self._requests.told(request, choice)
        self._put(streams, lambda: None)

    def announce(self, requests: Iterable[Request], *, confirmed: Callable[[], None]) -> None:
        """Says that this engine begins these. `confirmed` is called once, when the log has that of all that are still
        this engine's."""
        streams: _Streams = defaultdict(list)
        for request in requests:
            choice = min(request.open)
            prefix = request.prefixes[choice]
            stream = pb.StreamTokens(
                request_id=request.request_id, choice=choice, first_index=prefix.count, prefix_hash=prefix.hash
            )
            streams[request.reply_partition, request.source].append((stream, request))
            request.begun_at = [each.count for each in request.prefixes]
            request.epoch = self._epoch_of(request.source)
        self._put(streams, confirmed)

    def let_go(self, requests: Iterable[Request], *, confirmed: Callable[[], None]) -> None:
        """Says of requests that were announced, and are another engine's now, that this one did not die of them.
        `confirmed` is called once, when the log has that."""
        streams: _Streams = defaultdict(list)
        for request in requests:
            stream = pb.StreamTokens(request_id=request.request_id, let_go=True)
            streams[request.reply_partition, request.source].append((stream, request))
        self._put(streams, confirmed, is_farewell=True)

    async def run(self) -> None:
        """Sends until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for lane in self._lanes:
                tasks.create_task(self._serve(lane))

    async def _serve(self, lane: _Lane) -> None:
        while True:
            await lane.wake.wait()
            lane.wake.clear()
            if self._settle(lane):
                await asyncio.sleep(RETRY_SECONDS)
            await self._send(lane)

    def _add(self, streams: _Streams, request: Request, news: News) -> None:
        sequence = news.sequence
        prefix = request.prefixes[sequence.choice]
        assert prefix.count == news.first_index
        request.prefixes[sequence.choice] = prefix.extended(news.token_ids)
        stream = _stream(news, prefix_hash=prefix.hash)
        streams[request.reply_partition, request.source].append((stream, request))
        if news.finish is not None:
            self._metrics.ended(sequence)
            trace_sequence(self._tracer, request, sequence)
            self._requests.told(request, sequence.choice)

    def _put(self, streams: _Streams, confirmed: Callable[[], None], *, is_farewell: bool = False) -> None:
        """Makes records of the streams and queues them."""
        records = [
            (reply_partition, source, entries[start : start + MAX_STREAMS])
            for (reply_partition, source), entries in streams.items()
            for start in range(0, len(entries), MAX_STREAMS)
        ]
        if not records:
            confirmed()
            return
        delivery = _Delivery(len(records), confirmed)
        for reply_partition, source, entries in records:
            lane = self._lanes[reply_partition]
            lane.unsent.append(self._outgoing(source, entries, delivery, is_farewell=is_farewell))
            lane.wake.set()

    def _outgoing(
        self, source: TopicPartition, entries: list[_Entry], delivery: _Delivery, *, is_farewell: bool
    ) -> _Outgoing:
        epoch = entries[0][1].epoch if is_farewell else self._epoch_of(source)
        assert epoch is not None, "requests of a partition that was lost are dropped"
        batch = pb.TokenBatch(
            source=source_to_wire(source_of(source)),
            epoch=epoch,
            streams=[stream for stream, _ in entries],
            engine=self._engine,
        )
        ends = [(request, stream.choice) for stream, request in entries if stream.HasField("finish")]
        proves = [
            request
            for stream, request in entries
            if request.is_proof(stream.choice, stream.first_index + len(stream.token_ids))
        ]
        return _Outgoing(source, batch.SerializeToString(), ends, proves, is_farewell, delivery)

    def _settle(self, lane: _Lane) -> bool:
        """Acts on the acks that came. Returns whether some records failed."""
        for record in lane.confirmed():
            for request in record.proves:
                self._requests.when_proven(request)
            for request, choice in record.ends:
                self._requests.settle(request, choice)
            record.delivery.confirm_one()
        num_failed = lane.go_back()
        if num_failed:
            self._metrics.resent_records.inc(num_failed)
            log.warning("token records are sent again", reply_partition=lane.partition.partition, records=num_failed)
        return num_failed > 0

    async def _send(self, lane: _Lane) -> None:
        while lane.unsent and not any(each.has_failed for each in lane.sent):
            record = lane.unsent.popleft()
            if self._epoch_of(record.source) is None and not record.is_farewell:  # another engine answers now
                record.delivery.confirm_one()
                continue
            lane.sent.append(record)
            record.ack = await self._acked(lane.partition, record.value)
            record.ack.add_done_callback(lambda _: lane.wake.set())

    async def _acked(self, partition: TopicPartition, value: bytes) -> asyncio.Future[int]:
        """The future of a record's offset; a failed one where it could not even be sent."""
        try:
            return await self._bus.send(partition, value)
        except Unavailable as error:
            failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed


_Entry = tuple[pb.StreamTokens, Request]
_Streams = defaultdict[tuple[int, TopicPartition], list[_Entry]]
"""What goes into the records of one (reply partition, source partition)."""


def _stream(news: News, *, prefix_hash: int) -> pb.StreamTokens:
    sequence = news.sequence
    stream = pb.StreamTokens(
        request_id=sequence.request_id,
        choice=sequence.choice,
        first_index=news.first_index,
        token_ids=news.token_ids,
        logprobs=[_logprobs(each) for each in news.logprobs],
        prefix_hash=prefix_hash,
    )
    if news.finish is not None:
        stream.finish.CopyFrom(_finish(sequence, news.finish))
    return stream


def _logprobs(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top]
    return pb.TokenLogprobs(logprob=logprobs.logprob, top=top)


def _finish(sequence: Sequence, reason: FinishReason) -> pb.Finish:
    finish = pb.Finish(
        reason=_REASONS[reason],
        usage=pb.Usage(
            prompt_tokens=len(sequence.prompt_ids),
            cached_tokens=sequence.num_cached,
            completion_tokens=len(sequence.output_ids),
        ),
    )
    if reason is FinishReason.ERROR:
        never_ran = sequence.started_at is None
        finish.error.CopyFrom(_error((InvalidRequest if never_ran else InternalError)(sequence.error)))
    return finish


def _error(error: HoldfastError) -> pb.StreamError:
    return pb.StreamError(code=wire(error).grpc.value[0], message=str(error))
