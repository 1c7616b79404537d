"""Requests as gateways write them, and their answers as gateways read them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from holdfast import topics
from holdfast.accept import Epochs, Prefix, Source, Verdict, judge
from holdfast.bus import Bus, Reader
from holdfast.v1 import generation_pb2 as pb

REPLY = 5
"""The reply partition."""


def request(request_id: str, prompt_ids: list[int], *, model: str = "fake", **fields: Any) -> pb.GenerationRequest:
    """A greedy request of one choice; `fields` are those of the message, with `max_tokens` and `ignore_eos` for stop."""
    stop = pb.StopRules(max_tokens=fields.pop("max_tokens", 4), ignore_eos=fields.pop("ignore_eos", False))
    sampling = pb.SamplingParams(temperature=0, seed=1)
    defaults: dict[str, Any] = {"num_choices": 1, "reply_partition": REPLY, "sampling": sampling, "stop": stop}
    return pb.GenerationRequest(request_id=request_id, model=model, prompt_token_ids=prompt_ids, **(defaults | fields))


async def publish(bus: Bus, message: pb.GenerationRequest, *, partition: int = 2, batch: bool = False) -> int:
    topic = topics.REQUESTS_BATCH if batch else topics.REQUESTS_INTERACTIVE
    return await bus.publish(topic.partition(partition), message.SerializeToString(), key=message.request_id.encode())


async def cancel(bus: Bus, request_id: str, choice: int | None = None, *, accepted_at: Timestamp | None = None) -> None:
    message = pb.Cancel(request_id=request_id, choice=choice, accepted_at=accepted_at)
    await bus.publish(topics.CONTROL.partition(0), message.SerializeToString())


@dataclass
class Answer:
    """What a gateway knows of one choice."""

    prefix: Prefix = field(default_factory=Prefix)
    token_ids: list[int] = field(default_factory=list)
    finish: pb.Finish | None = None


class Answers:
    """All that is accepted from one reply partition, by the rule of `holdfast.accept`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._epochs = Epochs()
        self._answers: defaultdict[tuple[str, int], Answer] = defaultdict(Answer)
        self.is_lenient = False
        """Whether tokens that do not fit are passed over; else they fail the test."""
        self.num_repeated = 0
        """Tokens that came again."""
        self.records: list[pb.TokenBatch] = []
        """Those that bring tokens, or ends."""
        self.markers: list[pb.TokenBatch] = []
        """Those that bring none: markers, and what is announced."""

    def __getitem__(self, key: str | tuple[str, int]) -> Answer:
        return self._answers[(key, 0) if isinstance(key, str) else key]

    def start(self, partition: int, *, batch: bool = False) -> dict[str, int]:
        """Where a gateway that has read so far says a request's answer begins."""
        request_class = pb.REQUEST_CLASS_BATCH if batch else pb.REQUEST_CLASS_INTERACTIVE
        return {
            "reply_start_offset": self._reader.position(topics.TOKENS.partition(REPLY)),
            "reply_start_epoch": self._epochs.highest(Source(request_class, partition)),
        }

    async def until(self, holds: Callable[[], bool]) -> None:
        """Reads on until something holds."""
        async with asyncio.timeout(30):
            while not holds():
                for record in await self._reader.read():
                    self._take(pb.TokenBatch.FromString(record.value))

    async def catch_up(self) -> None:
        """Reads what there is by now."""
        while records := await self._reader.read(timeout=0):
            for record in records:
                self._take(pb.TokenBatch.FromString(record.value))

    async def finished(self, *keys: str | tuple[str, int]) -> None:
        """Reads on until all these have ended."""
        await self.until(lambda: all(self[key].finish is not None for key in keys))

    def _take(self, batch: pb.TokenBatch) -> None:
        tells = any(stream.token_ids or stream.HasField("finish") for stream in batch.streams)
        (self.records if tells else self.markers).append(batch)
        if not self._epochs.admit(Source(batch.source.request_class, batch.source.partition), batch.epoch):
            return
        for stream in batch.streams:
            answer = self[stream.request_id, stream.choice]
            ruling = judge(
                answer.prefix,
                first_index=stream.first_index,
                token_ids=stream.token_ids,
                prefix_hash=stream.prefix_hash,
            )
            assert self.is_lenient or ruling.verdict in (Verdict.ACCEPTED, Verdict.KNOWN), ruling
            self.num_repeated += ruling.num_known
            answer.prefix = ruling.prefix
            answer.token_ids += stream.token_ids[ruling.num_known :]
            if stream.HasField("finish"):
                answer.finish = stream.finish


@asynccontextmanager
async def answers(bus: Bus, *, reply: int = REPLY, start: int | None = None) -> AsyncIterator[Answers]:
    """From an offset on, or the log's end."""
    async with bus.reader({topics.TOKENS.partition(reply): start}) as reader:
        yield Answers(reader)
