"""From the news of a step to records of the token topic, and from their acks to requests that are done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry

from holdfast import topics
from holdfast.bus import Bus, TopicPartition
from holdfast.errors import InvalidRequest, Unavailable
from holdfast.telemetry import inject
from holdfast.v1 import generation_pb2 as pb
from services.engine import emit
from services.engine.commits import Commits
from services.engine.emit import Emitter
from services.engine.metrics import EngineMetrics
from services.engine.requests import Request, Requests
from services.engine.sequence import FinishReason, Phase, Sequence, TokenLogprobs
from tests.engine.driver import sequence
from tests.engine.engines import until

HERE = topics.REQUESTS_INTERACTIVE.partition(3)
THERE = topics.REQUESTS_BATCH.partition(4)


class SlowLog:
    """The part of a bus that an emitter uses; acks come, or fail, when the test says so."""

    def __init__(self) -> None:
        self.sent: list[tuple[TopicPartition, pb.TokenBatch]] = []
        self.acks: list[asyncio.Future[int]] = []
        self.refuses = 0
        """How many sends fail at once."""
        self.blocked: TopicPartition | None = None
        """Where a send waits for ever."""

    async def send(self, partition: TopicPartition, value: bytes) -> asyncio.Future[int]:
        if self.refuses:
            self.refuses -= 1
            raise Unavailable("no broker")
        if partition == self.blocked:
            await asyncio.Event().wait()
        self.sent.append((partition, pb.TokenBatch.FromString(value)))
        self.acks.append(asyncio.get_running_loop().create_future())
        return self.acks[-1]

    def ack(self, *indices: int) -> None:
        for index in indices:
            self.acks[index].set_result(index)

    def fail(self, *indices: int) -> None:
        for index in indices:
            self.acks[index].set_exception(Unavailable("no ack"))

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of each record's first stream."""
        return [list(batch.streams[0].token_ids) for _, batch in self.sent]


class Bench:
    """An emitter and all it needs."""

    def __init__(self, tracer: Tracer) -> None:
        self.log = SlowLog()
        self.commits = Commits()
        self.requests = Requests(self.commits)
        self.registry = CollectorRegistry()
        self.epochs: dict[TopicPartition, int] = {HERE: 7, THERE: 9}
        self.emitter = Emitter(
            cast(Bus, self.log),
            self.requests,
            engine="e",
            epoch_of=self.epochs.get,
            metrics=EngineMetrics(self.registry),
            tracer=tracer,
        )
        self.num_confirmed = self.num_requests = 0
        for partition in (HERE, THERE):
            self.commits.gain(partition, None)

    def request(self, request_id: str, *, source: TopicPartition = HERE, reply: int = 1, choices: int = 1) -> Request:
        self.num_requests += 1
        offset = self.num_requests - 1
        self.commits.begin(source, offset)
        sequences = tuple(sequence([1], request_id=request_id, choice=choice) for choice in range(choices))
        request = Request(request_id, source, offset, 0, (), reply, True, choices, sequences)
        self.requests.add(request)
        return request

    def tell(self, *tokens: tuple[Sequence, int], ends: FinishReason | None = None) -> None:
        """A step gave each sequence a token, and ended it with `ends`."""
        for each, token_id in tokens:
            each.output_ids.append(token_id)
            if ends is not None:
                each.phase, each.finish, each.ended_at = Phase.FINISHED, ends, 4.0
        self.emitter.deliver([each.tell() for each, _ in tokens], confirmed=self._confirm)

    def _confirm(self) -> None:
        self.num_confirmed += 1

    async def until_sent(self, count: int) -> None:
        await until(lambda: len(self.log.sent) == count)


@asynccontextmanager
async def bench(tracer: Tracer | None = None) -> AsyncIterator[Bench]:
    made = Bench(tracer or NoOpTracer())
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.emitter.run())
        yield made
        running.cancel()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to recover in these tests."""
    monkeypatch.setattr(emit, "RETRY_SECONDS", 0.0)


async def test_a_step_is_one_record_for_each_reply_and_source_partition() -> None:
    """Streams that share both share a record, which names the source and the epoch of its owner."""
    async with bench() as b:
        one, two = b.request("a", reply=1).sequences[0], b.request("b", reply=1).sequences[0]
        other_reply, other_source = b.request("c", reply=2), b.request("d", reply=1, source=THERE)
        b.tell((one, 5), (two, 6), (other_reply.sequences[0], 7), (other_source.sequences[0], 8))
        await b.until_sent(3)
        records = {(at.partition, batch.source.partition): batch for at, batch in b.log.sent}
        assert [stream.request_id for stream in records[1, 3].streams] == ["a", "b"]
        assert [stream.request_id for stream in records[2, 3].streams] == ["c"]
        assert [stream.request_id for stream in records[1, 4].streams] == ["d"]
        assert records[1, 3].epoch == 7
        assert records[1, 4].epoch == 9
        assert records[1, 4].source.request_class == pb.REQUEST_CLASS_BATCH
        assert b.num_confirmed == 0
        b.log.ack(0, 1)
        b.log.ack(2)
        await until(lambda: b.num_confirmed == 1)


async def test_every_record_says_what_came_before() -> None:
    """The prefix hash is the CRC-32 of all earlier tokens of the choice, 0 at first."""
    async with bench() as b:
        each = b.request("a").sequences[0]
        for token_id in (403, 407, 261):
            b.tell((each, token_id))
        await b.until_sent(3)
        streams = [batch.streams[0] for _, batch in b.log.sent]
        assert [stream.first_index for stream in streams] == [0, 1, 2]
        assert [stream.prefix_hash for stream in streams] == [0, 2406742881, 1125111013]


async def test_a_request_is_done_when_the_log_has_its_last_record() -> None:
    """Not before: until the ack another engine must be able to find it. All its choices count."""
    async with bench() as b:
        request = b.request("a", choices=2)
        b.tell(*((each, 1) for each in request.sequences[:1]), ends=FinishReason.STOP)
        b.tell(*((each, 1) for each in request.sequences[1:]), ends=FinishReason.STOP)
        await b.until_sent(2)
        assert b.requests.num_open(interactive=True) == 0
        b.log.ack(0)
        await until(lambda: b.num_confirmed == 1)
        assert b.commits.due()[HERE].offset == 0
        b.log.ack(1)
        await asyncio.wait_for(b.requests.until_empty(), 10)
        assert b.commits.due()[HERE].offset == 1


async def test_an_id_is_free_once_its_request_was_told_to_the_end() -> None:
    """Whoever has read the last token may use the id again, though the engine waits for the ack; each of the two
    requests is done with its own."""
    async with bench() as b:
        first = b.request("a")
        b.tell((first.sequences[0], 1), ends=FinishReason.STOP)
        assert b.requests.running("a") is None
        second = b.request("a")
        b.tell((second.sequences[0], 2), ends=FinishReason.STOP)
        await b.until_sent(2)
        b.log.ack(0)
        await until(lambda: not first.unsettled)
        assert b.commits.due()[HERE].offset == 1
        b.log.ack(1)
        await asyncio.wait_for(b.requests.until_empty(), 10)
        assert b.commits.due()[HERE].offset == 2


async def test_what_failed_is_sent_again_with_all_after_it_in_order() -> None:
    """No hole is left where one record of a stream got lost; readers know what comes twice."""
    async with bench() as b:
        each = b.request("a").sequences[0]
        for token_id in range(4):
            b.tell((each, token_id))
        await b.until_sent(4)
        b.log.ack(0, 2)
        b.log.fail(1)
        await b.until_sent(7)
        b.tell((each, 4), ends=FinishReason.LENGTH)
        await b.until_sent(8)
        assert b.log.texts == [[0], [1], [2], [3], [1], [2], [3], [4]]
        b.log.ack(4, 5, 6, 7)
        await asyncio.wait_for(b.requests.until_empty(), 10)
        assert b.num_confirmed == 5
        assert b.registry.get_sample_value("holdfast_resent_records_total") == 3


async def test_a_log_that_refuses_is_asked_again() -> None:
    """A send that fails at once loses nothing and changes no order."""
    async with bench() as b:
        each = b.request("a").sequences[0]
        b.log.refuses = 3
        b.tell((each, 1))
        b.tell((each, 2), ends=FinishReason.LENGTH)
        await b.until_sent(2)
        assert b.log.texts == [[1], [2]]


async def test_no_reply_partition_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is paused because a send failed, and another takes no record for now, the rest get theirs."""
    monkeypatch.setattr(emit, "RETRY_SECONDS", 3600.0)
    async with bench() as b:
        failing, blocked, well = (b.request(f"r{reply}", reply=reply).sequences[0] for reply in (1, 2, 3))
        b.tell((failing, 1))
        await b.until_sent(1)
        b.log.fail(0)
        b.log.blocked = topics.TOKENS.partition(2)
        b.tell((failing, 2), (blocked, 1), (well, 1))
        b.tell((well, 2), ends=FinishReason.LENGTH)
        await b.until_sent(3)
        assert [partition.partition for partition, _ in b.log.sent] == [1, 3, 3]
        b.log.ack(1, 2)
        await until(lambda: b.commits.due() != {})


async def test_what_was_lost_is_not_sent_any_more() -> None:
    """Once its partition is another engine's, nothing of a request is sent, and nobody waits for it."""
    async with bench() as b:
        each = b.request("a").sequences[0]
        b.log.refuses = 1
        b.tell((each, 1))
        del b.epochs[HERE]
        b.requests.drop([HERE])
        b.tell((each, 2))
        await until(lambda: b.num_confirmed == 2)
        assert b.log.sent == []


async def test_a_refused_request_ends_in_all_its_choices() -> None:
    """Each gets an end with the reason and its code, and the request is done with the ack."""
    async with bench() as b:
        request = Request("a", HERE, 0, 0, (), 1, True, 2)
        b.commits.begin(HERE, 0)
        b.requests.add(request)
        b.emitter.refuse(request, FinishReason.ERROR, InvalidRequest("no", field="x"))
        await b.until_sent(1)
        finishes = [stream.finish for stream in b.log.sent[0][1].streams]
        assert [finish.error.message for finish in finishes] == ["no", "no"]
        assert {finish.error.code for finish in finishes} == {3}
        b.log.ack(0)
        await asyncio.wait_for(b.requests.until_empty(), 10)


async def test_many_streams_are_spread_over_several_records() -> None:
    """No record becomes larger than the log takes."""
    async with bench() as b:
        sequences = [b.request(f"r{number}").sequences[0] for number in range(emit.MAX_STREAMS + 1)]
        b.tell(*((each, 1) for each in sequences))
        await b.until_sent(2)
        assert sorted(len(batch.streams) for _, batch in b.log.sent) == [1, emit.MAX_STREAMS]
        b.log.ack(0, 1)
        await until(lambda: b.num_confirmed == 1)


async def test_log_probabilities_travel_with_their_tokens() -> None:
    """As many as there are tokens, likeliest first."""
    async with bench() as b:
        each = b.request("a").sequences[0]
        each.output_logprobs.append(TokenLogprobs(-0.5, ((7, -0.5), (9, -1.5))))
        b.tell((each, 7))
        await b.until_sent(1)
        (logprobs,) = b.log.sent[0][1].streams[0].logprobs
        assert (logprobs.logprob, [top.token_id for top in logprobs.top]) == (-0.5, [7, 9])


async def test_spans_of_a_choice_hang_beneath_the_request() -> None:
    """Queue, prefill and decode, from the times that the scheduler noted, in the trace that the record's headers
    name."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    parent = tracer.start_span("request")
    async with bench(tracer) as b:
        request = b.request("a")
        request.headers = inject(parent)
        (each,) = request.sequences
        each.arrival, each.started_at, each.first_token_at = 1.0, 2.0, 3.0
        b.tell((each, 1), ends=FinishReason.STOP)
        await b.until_sent(1)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"queue", "prefill", "decode"}
    for name, begin in (("queue", 1), ("prefill", 2), ("decode", 3)):
        assert (spans[name].start_time, spans[name].end_time) == (begin * 10**9, (begin + 1) * 10**9)
        assert spans[name].context.trace_id == parent.get_span_context().trace_id
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == parent.get_span_context().span_id
