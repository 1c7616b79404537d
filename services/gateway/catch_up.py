"""Answers that are behind the end of their reply partition: just resumed, or of a client that reads slowly."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from holdfast.accept import Epochs
from holdfast.bus import Bus, Record
from holdfast.errors import Unavailable
from holdfast.records import source_from_wire
from holdfast.topics import TOKENS
from holdfast.v1 import generation_pb2 as pb
from services.gateway.answer import Answer
from services.gateway.choice import Mark
from services.gateway.streams import Streams

MAX_RECORDS = 64
"""Most records that are taken at once."""


async def catch_up(bus: Bus, answer: Answer, start: Mark, tail: Streams) -> None:
    """Gives the answer what the log holds of it from there on, as fast as its client takes it, until nothing lies between
    that and what the tail of its reply partition gives; then that does. Returns early where the answer ends."""
    partition, epochs = TOKENS.partition(tail.reply_partition), Epochs()
    epochs.admit(answer.source, start.epoch)
    answer.is_behind = True
    try:
        await tail.began()
        async with bus.reader({partition: start.offset}) as reader:
            while await answer.room():
                if (position := reader.position(partition)) >= tail.position:
                    tail.join(answer)  # at once: nothing may come in between
                    answer.caught_up(Mark(position, epochs.highest(answer.source)))
                    return
                for record in await reader.read(max_records=MAX_RECORDS):
                    _give(answer, record, epochs, tail)
    except Unavailable as error:
        answer.lose(Unavailable(f"the answer cannot be read from the log: {error}", retry_after=error.retry_after))


def _give(answer: Answer, record: Record, epochs: Epochs, tail: Streams) -> None:
    """What a record says about the answer, by rule R. What cannot be read, the tail reports."""
    try:
        batch = pb.TokenBatch.FromString(record.value)
    except DecodeError:
        return
    source = source_from_wire(batch.source)
    if source != answer.source or not epochs.admit(source, batch.epoch):
        return
    for tokens in batch.streams:
        if tokens.request_id == answer.log_id:
            tail.give(answer, tokens, offset=record.offset, epoch=batch.epoch)
