"""What the log tells of one request, in order: who took it, what they wrote, what of that readers accept, how it ended.
Pure: records in, events out. Readers' rule is `holdfast.accept`, here as everywhere.

Tokens that one owner wrote one after the other are one event, however many records they took.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.message import DecodeError

from holdfast import ids
from holdfast.accept import Epochs, Prefix, Ruling, Source, Verdict
from holdfast.bus import Record
from holdfast.epochs import describe_epoch
from holdfast.records import Entry, accepted_at_of, batch_from_wire, readable, source_from_wire
from holdfast.v1 import generation_pb2 as pb


class Kind(enum.Enum):
    """What happened."""

    ACCEPTED = "accepted"
    """The log had the request."""
    OWNER = "owner"
    """An engine spoke for the request's source partition for the first time, or under a later epoch."""
    BEGUN = "begun"
    """An owner announced that it begins the request, or goes on with it."""
    LET_GO = "let go"
    """An owner that had begun the request lost it, or left, and did not die of it."""
    TOKENS = "tokens"
    """An owner wrote tokens, and readers accepted them."""
    IGNORED = "ignored"
    """Somebody wrote what readers do not accept."""
    CANCEL = "cancel"
    """Somebody wished that it end."""
    GIVEN_UP = "given up"
    """A dead letter says so: owner after owner began it in vain."""
    ENDED = "ended"
    """A choice came to its end."""
    MISSING = "missing"
    """The log no longer holds what came here."""
    OPEN = "open"
    """A choice has not ended, as far as the log goes."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the request."""

    at_ms: int
    """When the log got to know it, in milliseconds since the epoch."""
    kind: Kind
    what: str
    """For people."""
    facts: Mapping[str, object]
    """For machines: JSON."""

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(self.at_ms / 1000, UTC)


@dataclass(slots=True)
class _Run:
    """Tokens of one choice that one owner wrote in a row."""

    first: int
    first_record: Record
    last_record: Record
    num_tokens: int = 0
    num_known: int = 0
    """Tokens beside those that were accepted before."""
    num_records: int = 0


@dataclass(slots=True)
class _Choice:
    prefix: Prefix = field(default_factory=Prefix)
    has_ended: bool = False
    run: _Run | None = None


class Timeline:
    """Reads the reply partition of a request, record by record, from where its answer begins."""

    def __init__(self, record: Record) -> None:
        """`record`: the request's.

        Raises:
            DecodeError: that is none.
        """
        self.request = request = pb.GenerationRequest.FromString(record.value)
        self._source = Source(request.request_class, record.partition)
        self._epochs = Epochs({self._source: request.reply_start_epoch})
        self._owner: int | None = None
        self._engine = ""
        self._is_missing = False
        self._choices = [_Choice() for _ in range(request.num_choices)]
        self._last_ms = record.timestamp_ms
        self.events = [_accepted(request, record)]

    @property
    def has_ended(self) -> bool:
        """Whether every choice has: what comes then counts for nothing."""
        return all(choice.has_ended for choice in self._choices)

    def feed(self, record: Record) -> None:
        """Takes the next record of the reply partition."""
        try:
            batch = pb.TokenBatch.FromString(record.value)
        except DecodeError:  # readers pass it over, too
            return
        if batch.HasField("source") and source_from_wire(batch.source) == self._source:
            self._feed(record, batch)

    def missing(self, at_ms: int, what: str) -> None:
        """The log no longer holds what came here."""
        self._add(at_ms, Kind.MISSING, what)
        self._is_missing = True

    def ended(self) -> list[Event]:
        """All of it, when nothing more is to be read."""
        self._close_runs()
        for index, choice in enumerate(self._choices):
            if not choice.has_ended and not self._is_missing:
                self._add(
                    self._last_ms,
                    Kind.OPEN,
                    f"choice {index} has not ended; it has {choice.prefix.count} tokens",
                    choice=index,
                    num_tokens=choice.prefix.count,
                )
        return self.events

    def _feed(self, record: Record, batch: pb.TokenBatch) -> None:
        self._last_ms = record.timestamp_ms
        pairs = zip(batch.streams, batch_from_wire(batch).entries, strict=True)
        ours = [(tokens, entry) for tokens, entry in pairs if tokens.request_id == self.request.request_id]
        for _, entry in ours:
            if entry.lets_go:
                what = f"{batch.engine or 'an engine'} has let go of it under epoch {describe_epoch(batch.epoch)}, and lives"
                self._add(record.timestamp_ms, Kind.LET_GO, what, **_writer(record, batch))
        said = [(tokens, entry) for tokens, entry in ours if not entry.lets_go]
        highest = self._epochs.highest(self._source)
        if not self._epochs.admit(self._source, batch.epoch):
            why = f"epoch {describe_epoch(batch.epoch)} is below {describe_epoch(highest)}, which was met before"
            for tokens, _ in said:
                self._ignored(record, batch, tokens, why)
            return
        if batch.epoch != self._owner and (said or not batch.streams):
            self._close_runs()
            self._owner, self._engine = batch.epoch, batch.engine
            what = (
                f"{batch.engine or 'an engine'} owns the request's partition, under epoch {describe_epoch(batch.epoch)}"
            )
            self._add(record.timestamp_ms, Kind.OWNER, what, **_writer(record, batch))
        for tokens, entry in said:
            self._take(record, batch, tokens, entry)

    def _take(self, record: Record, batch: pb.TokenBatch, tokens: pb.StreamTokens, entry: Entry) -> None:
        if tokens.choice >= len(self._choices):
            self._ignored(record, batch, tokens, f"the request has {len(self._choices)} choices")
            return
        choice = self._choices[tokens.choice]
        if choice.has_ended:
            self._ignored(record, batch, tokens, "the choice had ended")
            return
        if not tokens.token_ids and not tokens.HasField("finish"):
            what = f"{batch.engine or 'an engine'} begins, choice {tokens.choice} at token {tokens.first_index}"
            self._add(record.timestamp_ms, Kind.BEGUN, what, choice=tokens.choice, **_writer(record, batch))
            return
        ruling = entry.judged(choice.prefix)
        due, choice.prefix, choice.has_ended = choice.prefix.count, ruling.prefix, ruling.ends
        if ruling.verdict is Verdict.ACCEPTED:
            self._extend(choice, record, due, ruling)
        elif tokens.token_ids or not ruling.ends:
            self._ignored(record, batch, tokens, _why(ruling.verdict, due))
        if ruling.ends:
            self._close_runs()
            self._end(record, batch, tokens)

    def _extend(self, choice: _Choice, record: Record, due: int, ruling: Ruling) -> None:
        if choice.run is None:
            choice.run = _Run(first=due, first_record=record, last_record=record)
        run = choice.run
        run.last_record = record
        run.num_tokens = ruling.prefix.count - run.first
        run.num_known += ruling.num_known
        run.num_records += 1

    def _close_runs(self) -> None:
        """Tells of the tokens so far: something else comes."""
        for index, choice in enumerate(self._choices):
            run, choice.run = choice.run, None
            if run is None:
                continue
            last = run.first + run.num_tokens - 1
            known = f", {run.num_known} more were known already" if run.num_known else ""
            self._add(
                run.first_record.timestamp_ms,
                Kind.TOKENS,
                f"choice {index}: {_range(run.first, last)} in {run.num_records} records, offsets {run.first_record.offset} to "
                f"{run.last_record.offset}, in {(run.last_record.timestamp_ms - run.first_record.timestamp_ms) / 1000:.3f} s, by "
                f"{self._engine or 'an engine'} under epoch {describe_epoch(self._owner or 0)}{known}",
                choice=index,
                first_index=run.first,
                num_tokens=run.num_tokens,
                num_known=run.num_known,
                num_records=run.num_records,
                first_offset=run.first_record.offset,
                last_offset=run.last_record.offset,
                last_at_ms=run.last_record.timestamp_ms,
                epoch=self._owner,
                engine=self._engine,
            )

    def _ignored(self, record: Record, batch: pb.TokenBatch, tokens: pb.StreamTokens, why: str) -> None:
        self._close_runs()
        first, number = tokens.first_index, len(tokens.token_ids)
        wrote = _range(first, first + number - 1) if number else "no token"
        if tokens.HasField("finish"):
            wrote += f" and the end {_reason(tokens.finish.reason)}"
        self._add(
            record.timestamp_ms,
            Kind.IGNORED,
            f"choice {tokens.choice}: {wrote}, by {batch.engine or 'an engine'} under epoch {describe_epoch(batch.epoch)}, offset "
            f"{record.offset}: {why}",
            choice=tokens.choice,
            first_index=first,
            num_tokens=number,
            why=why,
            **_writer(record, batch),
        )

    def _end(self, record: Record, batch: pb.TokenBatch, tokens: pb.StreamTokens) -> None:
        finish, usage = tokens.finish, tokens.finish.usage
        error = f": {finish.error.message}" if finish.HasField("error") else ""
        self._add(
            record.timestamp_ms,
            Kind.ENDED,
            f"choice {tokens.choice}: {_reason(finish.reason)}{error}, offset {record.offset}; {usage.prompt_tokens} prompt tokens, "
            f"{usage.cached_tokens} of them cached, {usage.completion_tokens} generated",
            choice=tokens.choice,
            reason=_reason(finish.reason),
            error=finish.error.message,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            **_writer(record, batch),
        )

    def _add(self, at_ms: int, kind: Kind, what: str, **facts: object) -> None:
        self.events.append(Event(at_ms, kind, what, facts))


def cancels(request: pb.GenerationRequest, records: Iterable[Record], *, since_ms: int) -> Iterator[Event]:
    """What records of the control topic wish of a request, or of whichever has its id, since the log got it."""
    for record, wish in readable(records, pb.Cancel):
        named = accepted_at_of(wish)
        is_meant = record.timestamp_ms >= since_ms if named is None else named == accepted_at_of(request)
        if wish.request_id in (request.request_id, ids.of_client(request.request_id)) and is_meant:
            choice = wish.choice if wish.HasField("choice") else None
            yield Event(
                record.timestamp_ms,
                Kind.CANCEL,
                f"{'all of it' if choice is None else f'choice {choice}'}: {wish.reason or 'no reason given'}",
                {"choice": choice, "reason": wish.reason, "offset": record.offset},
            )


def letters(request_id: str, records: Iterable[Record]) -> Iterator[Event]:
    """What dead letters say of a request."""
    for record, letter in readable(records, pb.DeadLetter):
        if letter.request_id == request_id:
            epochs = ", ".join(map(describe_epoch, letter.epochs))
            yield Event(
                record.timestamp_ms,
                Kind.GIVEN_UP,
                f"by {letter.engine or 'an engine'}: {letter.reason}; begun in vain under epochs {epochs}; offset {record.offset}",
                {
                    "reason": letter.reason,
                    "epochs": list(letter.epochs),
                    "num_tokens": list(letter.num_tokens),
                    "engine": letter.engine,
                    "offset": record.offset,
                },
            )


def in_order(*sequences: Sequence[Event]) -> list[Event]:
    """Events of several partitions, by the time at which the log got to know them; those of one stay in their order where
    the clock stood still."""
    return sorted((event for events in sequences for event in events), key=lambda event: event.at_ms)


def _accepted(request: pb.GenerationRequest, record: Record) -> Event:
    deadline = request.deadline.ToDatetime(UTC).isoformat() if request.HasField("deadline") else None
    request_class = pb.RequestClass.Name(request.request_class).removeprefix("REQUEST_CLASS_").lower()
    facts: dict[str, object] = {
        "request_id": ids.of_client(request.request_id),
        "model": request.model,
        "class": request_class,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "accepted_at": request.accepted_at.ToDatetime(UTC).isoformat(),
        "prompt_tokens": len(request.prompt_token_ids),
        "num_choices": request.num_choices,
        "deadline": deadline,
        "reply_partition": request.reply_partition,
        "reply_start_offset": request.reply_start_offset,
        "reply_start_epoch": request.reply_start_epoch,
    }
    return Event(
        record.timestamp_ms,
        Kind.ACCEPTED,
        f"{request_class}, for {request.model}: {record.topic}[{record.partition}] offset {record.offset}; "
        f"{len(request.prompt_token_ids)} prompt tokens, {request.num_choices} choices, "
        f"{f'deadline {deadline}' if deadline else 'no deadline'}; answered in reply partition {request.reply_partition} from offset "
        f"{request.reply_start_offset}, epoch {describe_epoch(request.reply_start_epoch)}",
        facts,
    )


def _writer(record: Record, batch: pb.TokenBatch) -> dict[str, object]:
    return {"epoch": batch.epoch, "engine": batch.engine, "offset": record.offset}


def _why(verdict: Verdict, due: int) -> str:
    return {
        Verdict.KNOWN: "known already",
        Verdict.GAP: f"a gap: token {due} was due",
        Verdict.CONFLICT: "a conflict: its writer held other tokens before it",
    }[verdict]


def _range(first: int, last: int) -> str:
    return f"token {first}" if first == last else f"tokens {first} to {last}"


def _reason(reason: pb.FinishReason.ValueType) -> str:
    if reason not in pb.FinishReason.values():
        return f"of a reason that this version does not know ({reason})"
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_")
