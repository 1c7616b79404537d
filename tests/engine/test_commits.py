"""How far the engine is in each partition."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from holdfast.bus import MAX_METADATA_BYTES, Position, TopicPartition
from services.engine.commits import Commits

HERE = TopicPartition("requests", 3)


def owning(committed: Position | None = None) -> Commits:
    commits = Commits()
    commits.gain(HERE, committed)
    return commits


def test_the_watermark_is_the_first_record_that_is_not_done() -> None:
    """What is done above it travels in the metadata, so that a new owner skips it."""
    commits = owning()
    for offset in range(40, 48):
        assert commits.begin(HERE, offset)
    for offset in (40, 41, 43, 44, 46):
        commits.finish(HERE, offset)
    (position,) = commits.due().values()
    assert position == Position(42, "6;1-2,4-4")

    heir = owning(position)
    assert [offset for offset in range(42, 48) if heir.begin(HERE, offset)] == [42, 45, 47]


def test_what_is_begun_and_what_is_done_is_due_until_it_is_committed() -> None:
    """So gateways know what still waits in the log. A position is committed once."""
    commits = owning()
    assert commits.due() == {}
    commits.begin(HERE, 0)
    assert commits.changed.is_set()
    due = commits.due()
    assert due == {HERE: Position(0, "1;")}
    commits.committed(due)
    assert commits.due() == {}
    commits.changed.clear()
    commits.finish(HERE, 0)
    assert commits.changed.is_set()
    due = commits.due()
    assert due == {HERE: Position(1)}
    commits.committed(due)
    assert commits.due() == {}


def test_a_record_that_comes_again_is_known() -> None:
    """After a rebalance that left the partition here, records come again: begun or done, they are passed over."""
    commits = owning()
    for offset in (5, 6, 7):
        commits.begin(HERE, offset)
    commits.finish(HERE, 6)
    commits.finish(HERE, 5)
    assert [commits.begin(HERE, offset) for offset in (5, 6, 7, 8)] == [False, False, False, True]


def test_what_an_earlier_owner_did_is_forgotten_once_it_lies_behind() -> None:
    """Offsets of the metadata that the watermark passes without anything new being done are not written again."""
    commits = owning(Position(0, "3;1-2"))
    commits.begin(HERE, 0)
    commits.finish(HERE, 0)
    assert commits.due() == {HERE: Position(1, "2;0-1")}
    assert not commits.begin(HERE, 1)
    assert not commits.begin(HERE, 2)
    assert commits.due() == {HERE: Position(3)}


def test_what_ends_after_the_partition_was_lost_is_nobodys() -> None:
    """The new owner answers it."""
    commits = owning()
    commits.begin(HERE, 0)
    commits.lose([HERE])
    commits.finish(HERE, 0)
    assert commits.due() == {}


def test_metadata_of_another_version_means_nothing() -> None:
    """What cannot be read is taken as "none are done"."""
    commits = owning(Position(7, "{json}"))
    assert commits.begin(HERE, 7)


def test_offsets_that_are_no_records_do_not_part_a_run() -> None:
    """A log may skip offsets; runs of records done are written as one."""
    commits = owning()
    for offset in (0, 2, 4, 6, 8):
        commits.begin(HERE, offset)
    for offset in (2, 4, 8):
        commits.finish(HERE, offset)
    assert commits.due() == {HERE: Position(0, "9;2-4,8-8")}


def test_metadata_never_grows_beyond_what_a_position_holds() -> None:
    """With every other record done, the far end is left out and done again by the next owner."""
    commits = owning()
    for offset in range(10_000):
        commits.begin(HERE, offset)
        if offset % 2:
            commits.finish(HERE, offset)
    (position,) = commits.due().values()
    assert position.offset == 0
    assert 3000 < len(position.metadata) <= MAX_METADATA_BYTES


@given(
    offsets=st.lists(st.integers(0, 60), unique=True).map(sorted),
    data=st.data(),
)
def test_through_any_owners_every_record_is_done_by_somebody_and_none_is_skipped_before(
    offsets: list[int], data: st.DataObject
) -> None:
    """Owners follow one another, each ends some requests in any order and commits at some time. A record is passed over
    only by whom it was done or begun before, and once all is done the position is behind everything."""
    done: set[int] = set()
    committed: Position | None = None
    for owner in range(data.draw(st.integers(1, 4)) + 1):
        commits = owning(committed)
        begun = set()
        unread = [offset for offset in offsets if committed is None or offset >= committed.offset]
        last = owner == 4 or not unread
        reads = unread if last else unread[: data.draw(st.integers(0, len(unread)))]
        for offset in reads:
            if commits.begin(HERE, offset):
                begun.add(offset)
            else:
                assert offset in done
            for each in data.draw(st.lists(st.sampled_from(sorted(begun)), unique=True)) if begun else []:
                commits.finish(HERE, each)
                begun.discard(each)
                done.add(each)
        positions = commits.due()
        committed = positions.get(HERE, committed)
        assert committed is None or all(offset in done for offset in offsets if offset < committed.offset)
    commits = owning(committed)
    for offset in offsets:
        if committed is None or offset >= committed.offset:
            if not commits.begin(HERE, offset):
                assert offset in done
            commits.finish(HERE, offset)
    assert commits.due().get(HERE, committed or Position(0)).offset >= max(offsets, default=-1) + 1 or not offsets
