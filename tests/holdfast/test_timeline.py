"""A request's life from the log's records: what is told of each, and what readers make of it."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from holdfast.accept import Prefix
from holdfast.bus import Record
from holdfast.timeline import Event, Kind, Timeline, cancels, in_order, letters
from holdfast.topics import CONTROL, DEAD, REQUESTS_INTERACTIVE, TOKENS
from holdfast.v1 import generation_pb2 as pb

SOURCE = pb.SourcePartition(request_class=pb.REQUEST_CLASS_INTERACTIVE, partition=5)
START_MS = 1_800_000_000_000


def request_record(*, num_choices: int = 1, epoch: int = 0) -> Record:
    request = pb.GenerationRequest(
        request_id="r-1",
        model="tiny",
        request_class=pb.REQUEST_CLASS_INTERACTIVE,
        prompt_token_ids=[1, 2, 3],
        num_choices=num_choices,
        reply_partition=3,
        reply_start_offset=40,
        reply_start_epoch=epoch,
    )
    return Record(REQUESTS_INTERACTIVE.name, 5, 17, START_MS, request.SerializeToString(), key=b"r-1")


class Log:
    """The records of a reply partition, one after the other, each a millisecond later."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(
        self, *streams: pb.StreamTokens, epoch: int, engine: str = "e", source: pb.SourcePartition = SOURCE
    ) -> None:
        batch = pb.TokenBatch(source=source, epoch=epoch, streams=streams, engine=engine)
        number = len(self.records)
        self.records.append(Record(TOKENS.name, 3, 40 + number, START_MS + number + 1, batch.SerializeToString()))


def tokens(
    before: Sequence[int], new: Sequence[int], *, choice: int = 0, request_id: str = "r-1", finish: str = ""
) -> pb.StreamTokens:
    prefix = Prefix().extended(before)
    part = pb.StreamTokens(
        request_id=request_id, choice=choice, first_index=prefix.count, token_ids=new, prefix_hash=prefix.hash
    )
    if finish:
        usage = pb.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=len(before) + len(new))
        part.finish.CopyFrom(pb.Finish(reason=pb.FinishReason.Value(f"FINISH_REASON_{finish}"), usage=usage))
    return part


def told(log: Log, record: Record | None = None) -> list[Event]:
    timeline = Timeline(record or request_record())
    for each in log.records:
        timeline.feed(each)
    return timeline.ended()


def kinds(events: Sequence[Event]) -> list[str]:
    return [event.kind.value for event in events]


def test_an_undisturbed_life_is_four_lines() -> None:
    """Accepted, its owner, all tokens in one, the end; what others are told is not."""
    log = Log()
    log.write(epoch=7, engine="a")
    for index in range(5):
        log.write(tokens([9] * index, [9]), tokens([], [8], request_id="other"), epoch=7, engine="a")
        log.write(tokens([9] * index, [4]), epoch=1, source=pb.SourcePartition(request_class=1, partition=6))
    log.write(tokens([9] * 5, [9], finish="STOP"), epoch=7, engine="a")
    accepted, owner, run, end = told(log)
    assert kinds([accepted, owner, run, end]) == ["accepted", "owner", "tokens", "ended"]
    assert (accepted.facts["partition"], accepted.facts["offset"], accepted.facts["prompt_tokens"]) == (5, 17, 3)
    assert (owner.facts["epoch"], owner.facts["engine"], owner.facts["offset"]) == (7, "a", 40)
    assert (run.facts["first_index"], run.facts["num_tokens"], run.facts["num_records"]) == (0, 6, 6)
    assert (run.facts["first_offset"], run.facts["last_offset"], run.at_ms) == (41, 51, START_MS + 2)
    assert "tokens 0 to 5 in 6 records, offsets 41 to 51" in run.what
    assert (end.facts["reason"], end.facts["completion_tokens"], end.facts["cached_tokens"]) == ("STOP", 6, 1)


def test_a_takeover_shows_who_was_believed() -> None:
    """The first owner's tokens up to the marker count; what it writes behind it is ignored, and why is said."""
    log = Log()
    log.write(epoch=7, engine="a")
    log.write(tokens([], [1, 2]), epoch=7, engine="a")
    log.write(epoch=8, engine="b")
    log.write(tokens([1, 2], [66]), epoch=7, engine="a")
    log.write(tokens([1, 2], [3], finish="LENGTH"), epoch=8, engine="b")
    events = told(log)
    assert kinds(events) == ["accepted", "owner", "tokens", "owner", "ignored", "tokens", "ended"]
    assert [event.facts["engine"] for event in events[1:]] == ["a", "a", "b", "a", "b", "b"]
    assert events[4].facts["why"] == "epoch 0.7 is below 0.8, which was met before"
    assert (events[5].facts["first_index"], events[5].facts["num_tokens"]) == (2, 1)


def test_who_lets_go_says_so_though_nothing_else_of_theirs_counts() -> None:
    """Before the next owner's marker or behind it; of others it says nothing."""
    log = Log()
    let_go = pb.StreamTokens(request_id="r-1", let_go=True)
    log.write(tokens([], []), epoch=7, engine="a")
    log.write(pb.StreamTokens(request_id="other", let_go=True), let_go, epoch=7, engine="a")
    log.write(tokens([], []), epoch=8, engine="b")
    log.write(let_go, epoch=7, engine="a")
    log.write(tokens([], [1], finish="LENGTH"), epoch=8, engine="b")
    events = told(log)
    assert kinds(events) == ["accepted", "owner", "begun", "let go", "owner", "begun", "let go", "tokens", "ended"]
    assert [event.facts["engine"] for event in events if event.kind is Kind.LET_GO] == ["a", "a"]


def test_what_is_known_missing_or_of_another_text_is_ignored() -> None:
    """By readers' own rule; of a record that begins in what is known the rest counts."""
    log = Log()
    log.write(tokens([], [1, 2]), epoch=7)
    log.write(tokens([], [1, 2]), epoch=7)
    log.write(tokens([1, 2, 3], [4]), epoch=7)
    log.write(tokens([1, 9], [3]), epoch=7)
    log.write(tokens([1], [2, 3]), epoch=7)
    log.write(tokens([1, 2, 3], [], finish="CANCELLED"), epoch=7)
    log.write(tokens([1, 2, 3], [4]), epoch=7)
    events = told(log)
    assert kinds(events) == [
        "accepted", "owner", "tokens", "ignored", "ignored", "ignored", "tokens", "ended", "ignored"
    ]  # fmt: skip
    assert [str(event.facts["why"]).split(":")[0] for event in events if event.kind is Kind.IGNORED] == [
        "known already",
        "a gap",
        "a conflict",
        "the choice had ended",
    ]
    assert (events[6].facts["first_index"], events[6].facts["num_tokens"], events[6].facts["num_known"]) == (2, 1, 1)


def test_the_start_has_an_epoch() -> None:
    """What was written under an earlier one than the gateway had met is ignored from the first record on."""
    log = Log()
    log.write(tokens([], [66]), epoch=6)
    log.write(tokens([], [1], finish="STOP"), epoch=7)
    assert kinds(told(log, request_record(epoch=7))) == ["accepted", "ignored", "owner", "tokens", "ended"]


def test_choices_end_one_by_one() -> None:
    """And one that has not is said to be open, with what it has."""
    log = Log()
    log.write(tokens([], []), epoch=7)
    log.write(tokens([], [1]), tokens([], [2, 3], choice=1), epoch=7)
    log.write(tokens([1], [1], finish="LENGTH"), tokens([], [1], choice=9), epoch=7)
    events = told(log, request_record(num_choices=2))
    assert kinds(events) == ["accepted", "owner", "begun", "tokens", "tokens", "ended", "ignored", "open"]
    assert (events[-1].facts["choice"], events[-1].facts["num_tokens"]) == (1, 2)
    assert "has 2 choices" in events[-2].what


def test_unreadable_records_are_passed_over() -> None:
    """As readers do."""
    timeline = Timeline(request_record())
    timeline.feed(Record(TOKENS.name, 3, 40, START_MS, b"\xff\xff"))
    assert kinds(timeline.ended()) == ["accepted", "open"]


def test_cancellations_stand_at_their_time() -> None:
    """Between the tokens before and what came of them; those of other requests do not, even of its id or before it."""
    log = Log()
    log.write(tokens([], [1]), epoch=7)
    log.write(tokens([1], [], finish="CANCELLED"), epoch=7)
    wishes = [
        pb.Cancel(request_id="r-1", reason="the client left"),
        pb.Cancel(request_id="other"),
        pb.Cancel(request_id="r-1", reason="not this one", accepted_at=Timestamp(seconds=1)),
        pb.Cancel(request_id="r-1", choice=0, reason="a stop string was found"),
    ]
    records = [Record(CONTROL.name, 0, 9 + i, START_MS + 1, wish.SerializeToString()) for i, wish in enumerate(wishes)]
    request = pb.GenerationRequest.FromString(request_record().value)
    records += [
        Record(CONTROL.name, 0, 12, START_MS, b"\xff"),
        Record(CONTROL.name, 0, 8, START_MS - 1, wishes[0].SerializeToString()),
    ]
    request.accepted_at.FromSeconds(2)
    named = pb.Cancel(request_id="r-1", reason="it may not have been accepted", accepted_at=request.accepted_at)
    (early,) = cancels(
        request, [Record(CONTROL.name, 0, 7, START_MS - 1, named.SerializeToString())], since_ms=START_MS
    )
    assert early.what.endswith(named.reason), "it says which request it means"
    events = in_order(told(log), list(cancels(request, records, since_ms=START_MS)))
    assert kinds(events) == ["accepted", "owner", "tokens", "cancel", "cancel", "ended"]
    assert [event.what for event in events if event.kind is Kind.CANCEL] == [
        "all of it: the client left",
        "choice 0: a stop string was found",
    ]


def test_a_dead_letter_stands_before_the_end_that_it_explains() -> None:
    """With the epochs that began the request in vain; an engine that let go of it and lives is told of beside."""
    log = Log()
    log.write(epoch=7, engine="a")
    log.write(pb.StreamTokens(request_id="r-1", let_go=True), epoch=7, engine="a")
    log.write(tokens([], []), epoch=8, engine="b")
    log.write(tokens([], [], finish="ERROR"), epoch=10, engine="d")
    given_up = [
        pb.DeadLetter(
            request_id="r-1", reason="three engines died of it", epochs=[7, 8, 9], num_tokens=[0], engine="d"
        ),
        pb.DeadLetter(request_id="other"),
    ]
    records = [
        Record(DEAD.name, 0, index, START_MS + 3, letter.SerializeToString()) for index, letter in enumerate(given_up)
    ]
    events = in_order(told(log), list(letters("r-1", [*records, Record(DEAD.name, 0, 5, START_MS, b"\xff")])))
    assert [event.kind for event in events if event.kind is not Kind.OWNER] == [
        Kind.ACCEPTED,
        Kind.LET_GO,
        Kind.BEGUN,
        Kind.GIVEN_UP,
        Kind.ENDED,
    ]
    (letter,) = [event for event in events if event.kind is Kind.GIVEN_UP]
    assert letter.what == "by d: three engines died of it; begun in vain under epochs 0.7, 0.8, 0.9; offset 0"
