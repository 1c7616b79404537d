"""The records of the token topic as those see them who only want to know what is committed: without log-probabilities,
usage and reasons. Gateways, which show all that, translate for themselves (`services/gateway/streams.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.accept import End, Source
from holdfast.v1 import generation_pb2 as pb

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
