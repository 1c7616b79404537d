"""Messages of the log, read. Those of the token topic as those see them who only want to know what is committed: without
log-probabilities, usage and reasons. Gateways, which show all that, translate for themselves (`services/gateway/streams.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from holdfast.accept import End, Prefix, Ruling, Source, judge
from holdfast.bus import Record, TopicPartition
from holdfast.topics import CLASSES
from holdfast.v1 import generation_pb2 as pb

M = TypeVar("M", bound=Message)

_BY_TOKENS = frozenset([pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH])


@dataclass(frozen=True, slots=True)
class Entry:
    """What a record says about one choice of one request."""

    request_id: str
    choice: int
    first_index: int
    token_ids: Sequence[int]
    prefix_hash: int
    end: End = End.OPEN
    lets_go: bool = False
    """Whether it says only that its writer has let go of the request, alive."""

    def judged(self, accepted: Prefix) -> Ruling:
        """What the rule says of it after the accepted tokens of its choice, where its record is admitted."""
        return judge(
            accepted,
            first_index=self.first_index,
            token_ids=self.token_ids,
            prefix_hash=self.prefix_hash,
            end=self.end,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One record. Without entries it is its owner's marker."""

    source: Source
    epoch: int
    entries: Sequence[Entry] = ()


def batch_from_wire(batch: pb.TokenBatch) -> Batch:
    """The record in a message."""
    return Batch(source_from_wire(batch.source), batch.epoch, [_entry(each) for each in batch.streams])


def source_from_wire(source: pb.SourcePartition) -> Source:
    """The source partition in a message."""
    return Source(source.request_class, source.partition)


def source_of(partition: TopicPartition) -> Source:
    """A partition of a request topic, as a source."""
    return Source(CLASSES[partition.topic], partition.partition)


def source_to_wire(source: Source) -> pb.SourcePartition:
    """The source partition as a message."""
    return pb.SourcePartition(request_class=pb.RequestClass.ValueType(source.request_class), partition=source.partition)


def readable(records: Iterable[Record], kind: type[M]) -> Iterator[tuple[Record, M]]:
    """The records that are messages of this kind, each with its own; others are passed over."""
    for record in records:
        try:
            message = kind.FromString(record.value)
        except DecodeError:
            continue
        yield record, message


def accepted_at_of(message: pb.GenerationRequest | pb.Cancel) -> int | None:
    """When the request was admitted that the message is or means, in nanoseconds since the epoch; None where it does not
    say."""
    return message.accepted_at.ToNanoseconds() if message.HasField("accepted_at") else None


def _entry(tokens: pb.StreamTokens) -> Entry:
    return Entry(
        request_id=tokens.request_id,
        choice=tokens.choice,
        first_index=tokens.first_index,
        token_ids=list(tokens.token_ids),
        prefix_hash=tokens.prefix_hash,
        end=_end(tokens.finish) if tokens.HasField("finish") else End.OPEN,
        lets_go=tokens.let_go,
    )


def _end(finish: pb.Finish) -> End:
    """A reason that this version does not know ends a choice whatever its tokens are, as it does for gateways."""
    return End.BY_TOKENS if finish.reason in _BY_TOKENS else End.OUTRIGHT
