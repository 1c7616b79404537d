"""Records of the token topic as an owner reads them."""

from __future__ import annotations

import pytest

from holdfast.accept import End, Source
from holdfast.records import Batch, Entry, batch_from_wire
from holdfast.v1 import generation_pb2 as pb
from services.gateway.streams import part_from_wire


def test_a_record_is_read_as_it_was_written() -> None:
    """Its source, its epoch, and what it says about each choice."""
    written = pb.TokenBatch(
        source=pb.SourcePartition(request_class=pb.REQUEST_CLASS_BATCH, partition=7),
        epoch=(2 << 32) + 5,
        streams=[
            pb.StreamTokens(request_id="r", choice=1, first_index=3, token_ids=[4, 5], prefix_hash=9),
            pb.StreamTokens(request_id="s", finish=pb.Finish(reason=pb.FINISH_REASON_LENGTH)),
        ],
    )
    assert batch_from_wire(written) == Batch(
        Source(pb.REQUEST_CLASS_BATCH, 7),
        (2 << 32) + 5,
        [Entry("r", 1, 3, [4, 5], 9), Entry("s", 0, 0, [], 0, End.BY_TOKENS)],
    )
    assert batch_from_wire(pb.TokenBatch(epoch=1)) == Batch(Source(0, 0), 1, [])


@pytest.mark.parametrize("reason", [*pb.FinishReason.values(), 99])
def test_owners_and_gateways_read_an_end_alike(reason: int) -> None:
    """A new owner must take for ended, and where, what the client's gateway does."""
    tokens = pb.StreamTokens(finish=pb.Finish(reason=pb.FinishReason.ValueType(reason)))
    (entry,) = batch_from_wire(pb.TokenBatch(streams=[tokens])).entries
    finish = part_from_wire(tokens).finish
    assert finish is not None and entry.end is finish.end
