"""An owner's way from a gained partition to requests that it may answer, one step at a time."""

from __future__ import annotations

import pytest

from holdfast.accept import End, Place, Prefix, Source, extend_hash
from holdfast.ownership import Accepted, Claim, Scan, Standing, Tenure
from holdfast.records import Batch, Entry

SOURCE, OTHER = Source(1, 7), Source(2, 7)
TEXT = [11, 22, 33, 44, 55]


def request(name: str = "r", *, offset: int = 10, epoch: int = 0, num_choices: int = 1, reply: int = 0) -> Accepted:
    return Accepted(name, reply, Place(offset, epoch), num_choices)


def entry(
    first: int, last: int, *, name: str = "r", choice: int = 0, text: list[int] = TEXT, end: End = End.OPEN
) -> Entry:
    """text[first:last]."""
    return Entry(name, choice, first, text[first:last], extend_hash(0, text[:first]), end)


def owner(epoch: int = 5, *, markers: dict[int, int] | None = None) -> Tenure:
    """A tenure of two reply partitions, with markers at these offsets; a new request in each asked for them."""
    tenure = Tenure(SOURCE, epoch, range(2))
    for reply, offset in (markers or {}).items():
        tenure.meet(request(f"first in {reply}", offset=offset + 1, epoch=epoch, reply=reply))
        assert tenure.take_markers() == [reply]
        tenure.marked(reply, offset)
        assert len(tenure.take_claims()) == 1
    return tenure


def scan(tenure: Tenure, log: dict[int, Batch | None]) -> list[Claim]:
    """Makes the one scan that is due, and takes what is claimed."""
    (due,) = tenure.take_scans()
    for offset, batch in log.items():
        if offset >= due.start:
            due.feed(offset, batch)
    tenure.scanned(due)
    return tenure.take_claims()


def test_nothing_is_claimed_before_the_marker_is_acked_and_the_scan_done() -> None:
    """A request waits for the marker in its reply partition, then for the scan up to it; only then it may be told of."""
    tenure = owner()
    assert tenure.meet(request())
    assert tenure.take_markers() == [0]
    assert tenure.take_scans() == []
    tenure.marked(0, 20)
    (due,) = tenure.take_scans()
    assert (due.start, due.marker) == (10, 20)
    assert (tenure.take_claims(), tenure.may_emit("r")) == ([], False)
    due.feed(20, tenure.marker)
    tenure.scanned(due)
    assert [claim.request.request_id for claim in tenure.take_claims()] == ["r"]
    assert tenure.may_emit("r") and not tenure.may_emit("s")


def test_a_marker_is_asked_for_once_and_where_a_request_wants_it() -> None:
    """While it is on its way, and when it is there, it is not due again; and nowhere else."""
    tenure = owner()
    assert tenure.take_markers() == []
    tenure.meet(request(reply=1))
    assert tenure.take_markers() == [1]
    assert tenure.take_markers() == []
    tenure.marked(1, 12)
    tenure.meet(request("s", reply=1))
    assert tenure.take_markers() == []
    assert tenure.marker == Batch(SOURCE, 5)


def test_a_claim_has_what_the_rule_accepts_up_to_the_marker() -> None:
    """Tokens, hash and ends of each choice; nothing from below the highest epoch, from other sources or behind the
    marker."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request(num_choices=3))
    (claim,) = scan(
        tenure,
        {
            10: Batch(SOURCE, 1, [entry(0, 2)]),
            11: Batch(OTHER, 9, [entry(0, 5)]),
            12: Batch(SOURCE, 3, [entry(2, 3), entry(0, 2, choice=1, end=End.BY_TOKENS)]),
            13: Batch(SOURCE, 2, [entry(3, 5)]),
            14: None,
            15: Batch(SOURCE, 3, [entry(0, 5, name="s")]),
            20: tenure.marker,
            21: Batch(SOURCE, 3, [entry(3, 5)]),
        },
    )
    first, second, third = claim.standing.choices
    assert (first.token_ids, first.prefix, first.has_ended) == (TEXT[:3], Prefix().extended(TEXT[:3]), False)
    assert (second.token_ids, second.has_ended) == (TEXT[:2], True)
    assert (third.token_ids, third.has_ended) == ([], False)
    assert not claim.standing.has_ended and not claim.standing.contradiction


def standing_after(*batches: Batch, num_choices: int = 1) -> Standing:
    """That of a request of which the log has these, as the owner finds it that comes next."""
    tenure = owner(epoch=50, markers={0: 40})
    tenure.meet(request(num_choices=num_choices))
    log: dict[int, Batch | None] = dict(enumerate(batches, start=10))
    (claim,) = scan(tenure, log | {40: tenure.marker})
    return claim.standing


def test_an_entry_without_tokens_counts_as_a_start() -> None:
    """An engine that says that it begins, and dies of the prompt, is known to have tried; at the third one nobody else
    does, and an ended request is never exhausted."""
    begun = [Batch(SOURCE, epoch, [entry(0, 0)]) for epoch in (1, 2, 3)]
    assert not standing_after().is_suspect
    first, second, third = (standing_after(*begun[:count]) for count in (1, 2, 3))
    assert (first.vain, first.is_suspect, first.is_exhausted) == ({1}, True, False)
    assert (second.vain, second.is_exhausted) == ({1, 2}, False)
    assert (third.vain, third.is_exhausted) == ({1, 2, 3}, True)
    ended = standing_after(*begun, Batch(SOURCE, 4, [entry(0, 1, end=End.OUTRIGHT)]))
    assert ended.has_ended and not ended.is_exhausted


def test_a_request_that_got_on_is_as_good_as_new() -> None:
    """Two tokens of a choice, or its last one, and the starts before do not count; those after do. So an answer may pass
    through any number of hands."""
    begun = [Batch(SOURCE, epoch, [entry(0, 0)]) for epoch in (1, 2)]
    got_on = Batch(SOURCE, 3, [entry(0, 2)])
    assert not standing_after(*begun, got_on).is_suspect
    assert not standing_after(*begun, Batch(SOURCE, 3, [entry(0, 1)]), Batch(SOURCE, 3, [entry(1, 2)])).is_suspect
    assert standing_after(*begun, got_on, Batch(SOURCE, 4, [entry(2, 2)])).vain == {4}
    ended = Batch(SOURCE, 3, [entry(0, 1, choice=1, end=End.BY_TOKENS)])
    assert not standing_after(*begun, ended, num_choices=2).is_suspect
    hands = [Batch(SOURCE, epoch, [entry(epoch, epoch + 2, text=list(range(20)))]) for epoch in range(0, 12, 2)]
    assert not standing_after(*hands).is_suspect


def test_one_token_is_no_proof() -> None:
    """It comes of computing the prompt; what dies of the step after would leave one more each time. Nor is the same token
    sent again, nor one of each choice, nor an end that another hand made."""
    one_each = [Batch(SOURCE, epoch, [entry(epoch - 1, epoch)]) for epoch in (1, 2, 3)]
    assert standing_after(*one_each).is_exhausted
    assert standing_after(one_each[0], one_each[0]).vain == {1}
    both = Batch(SOURCE, 1, [entry(0, 1), entry(0, 1, choice=1)])
    assert standing_after(both, num_choices=2).vain == {1}
    cancelled = Batch(SOURCE, 1, [entry(0, 0, end=End.OUTRIGHT)])
    assert standing_after(cancelled, num_choices=2).vain == {1}


def test_an_owner_whose_word_is_ignored_counts_as_long_as_it_may_have_died() -> None:
    """What it announced does, and no longer once it told tokens; of the starts before these say nothing."""
    marker = Batch(SOURCE, 9)
    announced = Batch(SOURCE, 2, [entry(0, 0)])
    assert standing_after(Batch(SOURCE, 1, [entry(0, 0)]), marker, announced).vain == {1, 2}
    told = Batch(SOURCE, 2, [entry(0, 2)])
    assert standing_after(Batch(SOURCE, 1, [entry(0, 0)]), marker, announced, told).vain == {1}


def test_an_owner_that_let_go_is_not_counted() -> None:
    """It lives; of others that says nothing, and readers learn nothing from it."""
    begun = [Batch(SOURCE, epoch, [entry(0, 0)]) for epoch in (1, 2)]
    let_go = Entry("r", 0, 0, [], 0, lets_go=True)
    assert standing_after(*begun, Batch(SOURCE, 2, [let_go])).vain == {1}
    assert standing_after(*begun, Batch(SOURCE, 1, [let_go]), begun[0]).vain == {2}
    after_tokens = standing_after(Batch(SOURCE, 2, [entry(0, 1)]), Batch(SOURCE, 2, [let_go]))
    assert (after_tokens.vain, after_tokens.choices[0].token_ids, after_tokens.contradiction) == (set(), TEXT[:1], "")


def test_a_request_whose_gateway_knew_the_own_epoch_is_new() -> None:
    """It needs the marker, but no scan."""
    tenure = owner(epoch=5)
    tenure.meet(request(offset=21, epoch=5))
    assert tenure.take_markers() == [0]
    assert tenure.take_claims() == []
    tenure.marked(0, 20)
    (claim,) = tenure.take_claims()
    assert claim.standing.choices[0].token_ids == [] and claim.standing.is_new and not claim.standing.is_suspect
    assert tenure.take_scans() == [] and tenure.take_markers() == []


def test_a_start_without_the_own_epoch_behind_the_marker_wants_another_marker() -> None:
    """Its gateway knows no owner, so a frozen one's word counts until it meets a marker: that word is gone on from."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request(offset=30))
    assert tenure.take_scans() == []
    assert tenure.take_markers() == [0]
    tenure.marked(0, 40)
    (claim,) = scan(tenure, {31: Batch(SOURCE, 4, [entry(0, 2)]), 40: tenure.marker})
    assert claim.standing.choices[0].token_ids == TEXT[:2]


def test_a_request_that_the_log_does_not_reach_ends_instead_of_being_marked_for_for_ever() -> None:
    """A marker that was written after it was met lies before its start only where the log has lost records. One that came while
    the marker was on its way may be newer, and wants another."""
    tenure = owner()
    tenure.meet(request("beyond", offset=100))
    assert tenure.take_markers() == [0]
    tenure.meet(request("newer", offset=60))
    tenure.marked(0, 50)
    (claim,) = tenure.take_claims()
    assert claim.request.request_id == "beyond"
    assert "ends before the beginning" in claim.standing.contradiction
    assert tenure.take_markers() == [0]
    tenure.marked(0, 70)
    (claim,) = scan(tenure, {70: tenure.marker})
    assert (claim.request.request_id, claim.standing.contradiction) == ("newer", "")
    assert tenure.take_markers() == []


def test_each_request_is_judged_from_its_own_start() -> None:
    """A frozen owner's record is ignored for a request whose gateway knew better, and counts for one whose gateway did
    not; and what lies before a request's start is none of it."""
    tenure = owner(epoch=5, markers={0: 20})
    for each in (request("knew", epoch=4), request("did not"), request("later", offset=12, epoch=0)):
        tenure.meet(each)
    stale = Batch(SOURCE, 3, [entry(0, 2, name=name) for name in ("knew", "did not", "later")])
    claims = {claim.request.request_id: claim.standing for claim in scan(tenure, {11: stale, 20: tenure.marker})}
    assert claims["knew"].choices[0].token_ids == []
    assert claims["did not"].choices[0].token_ids == TEXT[:2]
    assert claims["later"].choices[0].token_ids == []


def test_what_lies_before_a_start_raises_no_epoch_for_it() -> None:
    """A gateway that began behind a marker, and knew of none, believed whoever wrote: so must the next owner. For a
    request from before the marker the same writer is ignored."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request("before", offset=10))
    tenure.meet(request("behind", offset=12))
    stale = Batch(SOURCE, 3, [entry(0, 2, name="before"), entry(0, 2, name="behind")])
    log = {11: Batch(SOURCE, 4), 13: stale, 20: tenure.marker}
    claims = {claim.request.request_id: claim.standing for claim in scan(tenure, log)}
    assert claims["before"].choices[0].token_ids == []
    assert claims["behind"].choices[0].token_ids == TEXT[:2]


def test_a_request_that_comes_later_is_told_from_the_scan_that_was_made() -> None:
    """A backlog is taken piece by piece without reading the log again, unless a request starts before the scan."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request("a", offset=10))
    log: dict[int, Batch | None] = {
        8: Batch(SOURCE, 2, [entry(0, 1, name="c")]),
        12: Batch(SOURCE, 2, [entry(0, 3, name="b")]),
        20: tenure.marker,
    }
    assert len(scan(tenure, log)) == 1
    tenure.meet(request("b", offset=11))
    (claim,) = tenure.take_claims()
    assert claim.standing.choices[0].token_ids == TEXT[:3]
    tenure.meet(request("c", offset=7))
    (claim,) = scan(tenure, log)
    assert (claim.request.request_id, claim.standing.choices[0].token_ids) == ("c", TEXT[:1])


def test_what_was_scanned_is_held_only_while_the_backlog_is_taken() -> None:
    """With the first request that starts behind it it goes; one that starts before that all the same is scanned for again."""
    tenure = owner(epoch=5)
    tenure.meet(request("a", offset=10))
    tenure.take_markers()
    tenure.marked(0, 20)
    log: dict[int, Batch | None] = {12: Batch(SOURCE, 2, [entry(0, 3, name="c")]), 20: tenure.marker}
    assert len(scan(tenure, log)) == 1
    assert tenure._lanes[0].scan is not None
    tenure.meet(request("b", offset=21, epoch=5))
    assert len(tenure.take_claims()) == 1
    assert tenure._lanes[0].scan is None
    tenure.meet(request("c", offset=11))
    (claim,) = scan(tenure, log)
    assert claim.standing.choices[0].token_ids == TEXT[:3]


def test_reply_partitions_do_not_wait_for_one_another() -> None:
    """A marker that is not acked keeps back the requests of its reply partition alone."""
    tenure = owner(epoch=5, markers={1: 0})
    tenure.meet(request("slow", offset=0, reply=0))
    tenure.meet(request("quick", offset=0, reply=1))
    assert tenure.take_markers() == [0]
    (claim,) = scan(tenure, {0: tenure.marker})
    assert claim.request.request_id == "quick"


@pytest.mark.parametrize(
    "log",
    [
        {12: Batch(SOURCE, 6)},
        {12: Batch(SOURCE, 6), 13: Batch(SOURCE, 4, [entry(0, 1)])},
        {12: Batch(SOURCE, 5, [entry(0, 1)])},
    ],
    ids=["a later owner's marker", "and an earlier owner's word behind it", "tokens under the own epoch"],
)
def test_a_tenure_ends_where_another_owner_shows(log: dict[int, Batch | None]) -> None:
    """A higher epoch before the own marker, or the own one in another's hand: nothing is claimed nor told any more."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request())
    assert scan(tenure, log | {20: tenure.marker}) == []
    assert tenure.is_over and tenure.outbid_by == max(batch.epoch for batch in log.values() if batch)
    tenure.meet(request("s", offset=21, epoch=5))
    assert (tenure.take_claims(), tenure.take_markers(), tenure.take_scans()) == ([], [], [])


def test_an_own_marker_that_is_there_twice_is_nobody_elses() -> None:
    """A marker that failed, and was sent again, may lie in the log before the one that was acked."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request(offset=13, epoch=5))
    assert len(scan(tenure, {20: tenure.marker})) == 1
    tenure.meet(request("s", offset=11))
    assert len(scan(tenure, {12: tenure.marker, 20: tenure.marker})) == 1
    assert not tenure.is_over


def test_a_request_of_a_later_epoch_ends_the_tenure() -> None:
    """Its gateway has met a later owner."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request(epoch=6))
    assert tenure.is_over and tenure.outbid_by == 6


def test_nothing_may_be_told_of_a_lost_partition() -> None:
    """Neither of what was claimed, nor of what was to be."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request(offset=21, epoch=5))
    assert tenure.may_emit("r")
    tenure.end()
    assert not tenure.may_emit("r")
    assert tenure.take_claims() == []
    assert tenure.outbid_by == 0


def test_what_is_delivered_again_is_known_until_it_is_forgotten() -> None:
    """After a rebalance requests come again; once their offset is committed they do not."""
    tenure = owner(epoch=5, markers={0: 20})
    again = request(offset=21, epoch=5)
    assert tenure.meet(again)
    assert not tenure.meet(again)
    assert len(tenure.take_claims()) == 1
    tenure.forget("r")
    assert not tenure.may_emit("r")
    assert tenure.meet(again)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (entry(2, 3), "choice 0: tokens from 2 on are a gap where 1 are accepted"),
        (entry(1, 2, text=[99, 1]), "choice 0: tokens from 1 on are a conflict where 1 are accepted"),
        (entry(0, 1, choice=1), "tokens of choice 1 of 1"),
    ],
)
def test_a_log_that_contradicts_itself_is_named(bad: Entry, says: str) -> None:
    """Readers go no further than the contradiction, and so does the standing."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request())
    log = {10: Batch(SOURCE, 1, [entry(0, 1)]), 11: Batch(SOURCE, 1, [bad]), 12: Batch(SOURCE, 1, [entry(1, 5)])}
    (claim,) = scan(tenure, log | {20: tenure.marker})
    assert says in claim.standing.contradiction
    assert claim.standing.choices[0].token_ids == TEXT[:1]


def test_an_answer_whose_beginning_is_gone_is_nobodys_to_go_on_with() -> None:
    """Nobody can tell what was shown of it; of one that begins where the log does, everybody can."""
    tenure = owner(epoch=5, markers={0: 20})
    tenure.meet(request("gone", offset=9))
    tenure.meet(request("kept", offset=10))
    (due,) = tenure.take_scans()
    due.kept_from = 10
    due.feed(10, Batch(SOURCE, 1, [entry(1, 3, name="gone"), entry(0, 2, name="kept")]))
    due.feed(20, tenure.marker)
    tenure.scanned(due)
    gone, kept = (claim.standing for claim in tenure.take_claims())
    assert gone.contradiction == "the log no longer holds the beginning of its answer"
    assert (kept.contradiction, kept.choices[0].token_ids) == ("", TEXT[:2])


def test_a_scan_is_done_at_its_marker_or_behind_it() -> None:
    """What lies behind is not taken, and a record of another kind at the marker's place ends it too."""
    scan = Scan(SOURCE, reply_partition=0, start=3, marker=5)
    scan.feed(3, None)
    assert not scan.is_done
    scan.feed(6, Batch(SOURCE, 9))
    assert scan.is_done and scan.highest == 0


def test_a_reply_partition_that_is_not_there_is_refused() -> None:
    """By its number."""
    with pytest.raises(ValueError, match="no reply partition 4"):
        owner().meet(request(reply=4))
