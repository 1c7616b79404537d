"""One request's life in the gateway, from top to bottom: admit, tokenize, publish, stream, finish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from opentelemetry.context import Context

from holdfast import ids
from holdfast.accept import Source
from holdfast.bus import Bus
from holdfast.errors import ConfigurationError, InvalidRequest, RequestTooLarge, Unavailable
from holdfast.events import Accepted, Finished, Model, Result, Tokens, collected
from holdfast.telemetry import inject
from holdfast.topics import REQUESTS
from holdfast.v1 import gateway_pb2
from holdfast.v1 import generation_pb2 as pb
from services.gateway.admission import Admission, Admitted
from services.gateway.answer import Answer
from services.gateway.backlog import Backlog, Entry
from services.gateway.cancel import Canceller
from services.gateway.choice import Mark, Place
from services.gateway.cursor import Cursor, Cursors
from services.gateway.handover import Handover, Moves
from services.gateway.home import Home
from services.gateway.observation import Observation, Observer
from services.gateway.opening import Opening
from services.gateway.readiness import Readiness
from services.gateway.resume import Resumer, Resumption
from services.gateway.routing import Routing
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Streams
from services.gateway.submissions import Submissions
from services.gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Call:
    """How a request came."""

    face: str
    """grpc or http."""
    time_left: float | None = None
    """Seconds until the call itself ends; None for never."""
    trace: Context = field(default_factory=Context)
    """The client's span."""
    spelled: bool = False
    """Whether the client wants the text of tokens beside their log-probabilities."""
    clients_id: str = ""
    """What the client calls it, for logs and traces alone."""
    default_max_tokens: int | None = None
    """Most tokens of each choice where the request does not say; None for what the context leaves."""
    moves: Moves = Moves.NEVER
    """When whoever reads the answer goes on elsewhere, if this gateway stops."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that the log may get."""

    admitted: Admitted
    record: pb.GenerationRequest
    """As the log is to get it."""
    answer: Answer
    streams: Streams
    """That its answer will come to."""
    backlog: Backlog
    entry: Entry
    seen: Observation


class Gateway:
    """What a gateway does, whichever face it is asked through. Everything raises `holdfast.errors`."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        bus: Bus,
        tokenizer: Tokenizer,
        home: Home,
        canceller: Canceller,
        cursors: Cursors,
        opening: Opening,
        resumer: Resumer,
        admission: Admission,
        backlogs: Mapping[pb.RequestClass.ValueType, Backlog],
        handover: Handover,
        readiness: Readiness,
        observer: Observer,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._tokenizer = tokenizer
        self._home = home
        self._canceller = canceller
        self._cursors = cursors
        self._opening = opening
        self._resumer = resumer
        self._admission = admission
        self._backlogs = backlogs
        self._handover = handover
        self._readiness = readiness
        self._observer = observer
        self._routing = Routing(affinity_tokens=settings.affinity_tokens)
        self._submissions = Submissions()

    @asynccontextmanager
    async def generate(self, request: gateway_pb2.GenerateRequest, call: Call) -> AsyncIterator[Answer]:
        """The answer to a request. The block is entered once the log has the request; leaving it before the answer's
        end cancels the request, or not, as it asks."""
        async with self._prepared(request, call) as prepared:
            answer = prepared.answer
            with prepared.streams.open(answer):
                await self._publish(prepared)
                prepared.seen.answer = answer
                try:
                    with answer.expiring(prepared.admitted.time_left()), self._handover.of(answer, call.moves):
                        yield answer
                finally:
                    if answer.is_answered:
                        prepared.backlog.answered(prepared.entry)

    async def submit(self, request: gateway_pb2.GenerateRequest, call: Call) -> Accepted:
        """Has a request run in the background; returns once the log has it. Asked again in the same words under the same
        id, it is the same request."""
        return await self._submissions.once(request, lambda: self._submit(request, call))

    async def _submit(self, request: gateway_pb2.GenerateRequest, call: Call) -> Accepted:
        if request.cancel_on_disconnect:
            raise InvalidRequest(
                "cancel_on_disconnect must be false: a submitted request has no connection",
                field="request.cancel_on_disconnect",
            )
        async with self._prepared(request, call) as prepared:
            await self._publish(prepared)
        answer = prepared.answer
        return Accepted(answer.request_id, cursor=answer.cursor, prompt_tokens=answer.prompt_tokens)

    @asynccontextmanager
    async def resume(self, cursor: str, call: Call, *, only_ask: bool = False) -> AsyncIterator[Resumption]:
        """The answer to a request from a cursor on, whichever gateway gave it out. Leaving the block early cancels the
        request where it asked for that; with `only_ask` not even there."""
        with self._observer.resumption(face=call.face, parent=call.trace) as seen, self._admission.resumed_place():
            self._readiness.check("log")
            async with self._resumer.resume(cursor, spelled=call.spelled, only_ask=only_ask) as resumption:
                seen.answer = resumption.answer
                with self._handover.of(resumption.answer, call.moves):
                    yield resumption

    async def result(self, cursor: str, call: Call, *, wait: float | None) -> Result:
        """The whole answer, from the cursor of its start; after `wait` seconds what there is of it."""
        async with self.resume(cursor, call, only_ask=True) as resumption:
            answer, places = resumption.answer, resumption.start.places
            if any(place.prefix.count or place.end for place in places):
                raise InvalidRequest(
                    "the cursor stands within the stream; a result needs the one of its start, as Submit gave it",
                    field="cursor",
                )
            events: list[Tokens | Finished] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    while not answer.at_end:
                        events += await answer.next()
        return collected(answer.request_id, prompt_tokens=answer.prompt_tokens, num_choices=len(places), events=events)

    async def cancel(self, request_id: str, cursor: str = "") -> None:
        """Has a request end, wherever it runs, or all of an id; returns once the log has the wish."""
        if bool(request_id) == bool(cursor):
            raise InvalidRequest("a cancellation names either a request_id or a cursor", field="request_id")
        if request_id:
            ids.check(request_id)
        await self._canceller.cancel(request_id or self.request_id(cursor), "a client asked for it")

    def request_id(self, cursor: str) -> str:
        """What the log calls the request that a cursor is of. Raises `InvalidRequest` for what is no cursor of this mesh."""
        return self._cursors.decode(cursor).request_id

    def models(self) -> list[Model]:
        """The models that this mesh serves."""
        return [self._tokenizer.model]

    @asynccontextmanager
    async def _prepared(self, request: gateway_pb2.GenerateRequest, call: Call) -> AsyncIterator[_Prepared]:
        """The request, admitted, tokenized and with a partition to go to; leaving the block gives its place back."""
        async with self._admitted(request, call) as (admitted, streams, seen):
            backlog = self._backlogs[admitted.request_class]
            with backlog.entering() as entry:
                prompt_ids = await self._tokenize(admitted, call, seen)
                partition = self._routing.choose(admitted.request_class, prompt_ids, backlog.loads, backlog.full)
                backlog.goes_to(entry, partition)
                record = self._record(admitted, prompt_ids, partition, streams)
                answer = self._opening.answer(_start(record, partition), record, streams, spelled=call.spelled)
                yield _Prepared(admitted, record, answer, streams, backlog, entry, seen)

    @asynccontextmanager
    async def _admitted(
        self, request: gateway_pb2.GenerateRequest, call: Call
    ) -> AsyncIterator[tuple[Admitted, Streams, Observation]]:
        """The request, with a place among the open ones, and the streams that its answer will come to."""
        observed = self._observer.request(request, face=call.face, parent=call.trace, clients_id=call.clients_id)
        with observed as seen, self._admission.place():
            admitted = self._admit(request, call, seen)
            async with self._home.streams() as streams:
                streams.check_new(admitted.request_id)
                yield admitted, streams, seen

    def _admit(self, request: gateway_pb2.GenerateRequest, call: Call, seen: Observation) -> Admitted:
        model = self._tokenizer.model
        request = self._tokenizer.with_defaults(request)
        admitted = self._admission.admit(request, model, call_time_left=call.time_left)
        seen.admit(admitted, model.name)
        self._readiness.check("log")
        self._backlogs[admitted.request_class].check(admitted.time_left())
        return admitted

    async def _tokenize(self, admitted: Admitted, call: Call, seen: Observation) -> list[int]:
        with seen.phase("tokenize"):
            prompt_ids = await self._tokenizer.encode(admitted.request, time_left=admitted.time_left())
        model, rules = self._tokenizer.model, admitted.request.stop
        self._admission.check_prompt(admitted, prompt_ids, model)
        if call.default_max_tokens is not None and not rules.HasField("max_tokens"):
            rules.max_tokens = min(call.default_max_tokens, model.context_length - len(prompt_ids))
        return prompt_ids

    async def _publish(self, prepared: _Prepared) -> None:
        """Returns once the log has the request."""
        admitted, answer = prepared.admitted, prepared.answer
        partition = REQUESTS[admitted.request_class].partition(answer.source.partition)
        with prepared.seen.phase("publish") as span, self._cancelled_if_unknown(admitted):
            try:
                async with asyncio.timeout(self._settings.log_seconds):
                    offset = await self._bus.publish(
                        partition,
                        prepared.record.SerializeToString(),
                        key=admitted.request_id.encode(),
                        headers=inject(span),
                    )
            except TimeoutError as error:
                raise Unavailable(
                    f"the log did not take the request within {self._settings.log_seconds:g} seconds; it may not have been accepted"
                ) from error
        answer.published(offset)
        prepared.backlog.published(prepared.entry)

    def _record(
        self, admitted: Admitted, prompt_ids: list[int], partition: int, streams: Streams
    ) -> pb.GenerationRequest:
        """The request as the log gets it. What is written in these streams from now on may belong to its answer."""
        record = pb.GenerationRequest(
            request_id=admitted.log_id,
            model=self._tokenizer.model.name,
            request_class=admitted.request_class,
            prompt_token_ids=prompt_ids,
            sampling=admitted.request.sampling,
            stop=admitted.request.stop,
            num_choices=admitted.num_choices,
            reply_partition=streams.reply_partition,
            reply_start_offset=streams.position,
            reply_start_epoch=streams.epochs.highest(Source(admitted.request_class, partition)),
            presentation=pb.Presentation(
                cancel_on_disconnect=admitted.request.cancel_on_disconnect,
                return_token_ids=admitted.request.return_token_ids,
                show_special_tokens=admitted.request.show_special_tokens,
            ),
        )
        record.sampling.seed = admitted.seed
        record.accepted_at.FromNanoseconds(admitted.accepted_at)
        if admitted.deadline is not None:
            record.deadline.FromNanoseconds(round(admitted.deadline * 1e9))
        return record

    @contextmanager
    def _cancelled_if_unknown(self, admitted: Admitted) -> Iterator[None]:
        """Where publishing fails, or is left, the log may have the request all the same: nobody was told so, and nobody
        waits for it. The wish may come late; a client that asks again under the same id is not meant."""
        try:
            yield
        except (RequestTooLarge, ConfigurationError):
            raise  # it was not sent
        except BaseException:
            reason = "it may not have been accepted"
            self._canceller.wish(admitted.log_id, None, reason, accepted_at=admitted.accepted_at)
            raise


def _start(record: pb.GenerationRequest, partition: int) -> Cursor:
    """Before the first token of the answer to a request, which goes to this partition."""
    return Cursor(
        record.request_id,
        source=Source(record.request_class, partition),
        request_offset=0,  # until it is published
        reply_partition=record.reply_partition,
        mark=Mark(record.reply_start_offset, record.reply_start_epoch),
        places=(Place.at_start(record.prompt_token_ids),) * record.num_choices,
    )
