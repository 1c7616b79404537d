"""The open streams of one reply partition, fed from its end as it grows.

One task reads the log. It applies rule R to every record, hands what concerns an open answer to that answer, and never
waits for anything but the log: not for the tokenizer, and not for a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from google.protobuf.message import DecodeError

from holdfast.accept import Epochs
from holdfast.bus import Bus, Record, TopicPartition
from holdfast.errors import AlreadyExists, HoldfastError, StreamFailed, Unavailable, from_code
from holdfast.events import TokenLogprobs, TopLogprob, Usage
from holdfast.records import source_from_wire
from holdfast.topics import TOKENS
from holdfast.v1 import generation_pb2 as pb
from services.gateway.answer import Answer
from services.gateway.choice import Finish, Part
from services.gateway.cursor import FROM_WIRE
from services.gateway.detokenize import Detokenizer
from services.gateway.metrics import Metrics
from services.gateway.readiness import Readiness
from services.gateway.tokenizer import Tokenizer

log = structlog.get_logger(__name__)


class Streams:
    """The open answers by request id: of one there are several where a stream is read twice. Bounded by the places that
    admission gives."""

    def __init__(
        self,
        bus: Bus,
        *,
        reply_partition: int,
        tokenizer: Tokenizer,
        detokenizer: Detokenizer,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self.reply_partition = reply_partition
        self.epochs = Epochs()
        self._bus = bus
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._readiness = readiness
        self._metrics = metrics
        self._answers: dict[str, list[Answer]] = {}
        """Those that are open, by the log's id."""
        self._open_ids: set[str] = set()
        """What the clients call the requests whose blocks are open."""
        self._position: int | None = None
        self._began = asyncio.Event()

    @property
    def position(self) -> int:
        """The offset that is read next: what is published from now on gets its answer at or after it.

        Raises:
            Unavailable: the log was never read yet.
        """
        if self._position is None:
            raise Unavailable("the log has not answered yet")
        return self._position

    def check_new(self, request_id: str) -> None:
        """Raises AlreadyExists where the stream of a request of this id is open here, from before it is published on."""
        if request_id in self._open_ids:
            raise AlreadyExists(f"a request with the id {request_id} is open here; choose another, or none")

    @contextmanager
    def open(self, answer: Answer) -> Iterator[Answer]:
        """Feeds an answer until it ends, or the block is left, which closes it.

        Raises:
            AlreadyExists: a request of this id is open here.
        """
        self.check_new(answer.request_id)
        self._open_ids.add(answer.request_id)
        self.join(answer)
        try:
            yield answer
        finally:
            self._open_ids.remove(answer.request_id)
            answer.close()

    async def began(self) -> None:
        """Returns once there is a position."""
        await self._began.wait()

    def join(self, answer: Answer) -> None:
        """Feeds an answer that has been given all before the position, until it ends."""
        self._answers.setdefault(answer.log_id, []).append(answer)

    def forget(self, answer: Answer) -> None:
        """The answer has ended: what still comes for it is ignored."""
        if answer in (same := self._answers.get(answer.log_id, [])):
            same.remove(answer)
            if not same:
                del self._answers[answer.log_id]

    async def run(self) -> None:
        """Reads the log until cancelled. Where it cannot be read from the position reached, streams wait and reading
        is tried again from there; where that fails again they break, and reading goes on from the log's end."""
        partition = TOKENS.partition(self.reply_partition)
        start: int | None = None
        while True:
            try:
                await self._read(partition, start)
            except Unavailable as error:
                log.warning("the log cannot be read", position=self._position, reason=str(error))
                await self._readiness.lost("log", str(error))
                start = self._retreat(start, error)
                await asyncio.sleep(error.retry_after)

    def _retreat(self, start: int | None, error: Unavailable) -> int | None:
        """Where to read from after an error: from where reading stood, or if it never got further, the end."""
        if self._position is None or start != self._position:
            return self._position
        for answer in [answer for same in self._answers.values() for answer in same]:
            answer.lose(Unavailable(f"the answer cannot be read from the log: {error}"))
        return None

    async def _read(self, partition: TopicPartition, start: int | None) -> None:
        async with self._bus.reader({partition: start}) as reader:
            self._position = reader.position(partition)
            self._began.set()
            await self._readiness.found("log")
            while True:
                for record in await reader.read():
                    self._take(record)
                self._position = reader.position(partition)

    def _take(self, record: Record) -> None:
        try:
            batch = pb.TokenBatch.FromString(record.value)
        except DecodeError as error:
            self._metrics.unreadable_records.inc()
            log.error("a record of the token topic is no TokenBatch", offset=record.offset, reason=str(error))
            return
        source = source_from_wire(batch.source)
        if not self.epochs.admit(source, batch.epoch):
            self._metrics.stale_records.inc()
            return
        for tokens in batch.streams:
            for answer in tuple(self._answers.get(tokens.request_id, ())):
                # An id may be used again, while an engine still works on the request that had it before. And an answer
                # that joined may have met an epoch that lies before the first record that was read here.
                if answer.source == source and batch.epoch >= answer.epoch:
                    self.give(answer, tokens, offset=record.offset, epoch=batch.epoch)

    def give(self, answer: Answer, tokens: pb.StreamTokens, *, offset: int, epoch: int) -> None:
        """What an admitted record says about an answer."""
        if unknown := [each for each in tokens.token_ids if each >= self._tokenizer.model.vocab_size]:
            answer.fail(StreamFailed(f"the engine wrote token {unknown[0]}, which the model's tokenizer does not have"))
            return
        choice = answer.accept(part_from_wire(tokens), offset=offset, epoch=epoch)
        if choice is not None:
            self._detokenizer.put(choice, answer)


def part_from_wire(tokens: pb.StreamTokens) -> Part:
    """What a record says about one choice."""
    return Part(
        choice=tokens.choice,
        first_index=tokens.first_index,
        token_ids=list(tokens.token_ids),
        logprobs=_logprobs(tokens.logprobs),
        prefix_hash=tokens.prefix_hash,
        finish=_finish(tokens.finish) if tokens.HasField("finish") else None,
    )


def _logprobs(logprobs: Sequence[pb.TokenLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(each.logprob, tuple(TopLogprob(top.token_id, top.logprob) for top in each.top))
        for each in logprobs
    ]


def _finish(finish: pb.Finish) -> Finish:
    usage = Usage(finish.usage.prompt_tokens, finish.usage.cached_tokens, finish.usage.completion_tokens)
    if finish.reason in FROM_WIRE:
        return Finish(FROM_WIRE[finish.reason], usage)
    return Finish(None, usage, _error(finish))


def _error(finish: pb.Finish) -> HoldfastError:
    if finish.reason == pb.FINISH_REASON_ERROR:
        return from_code(finish.error.code, finish.error.message)
    return StreamFailed(f"the engine ended the stream for a reason that this gateway does not know ({finish.reason})")
