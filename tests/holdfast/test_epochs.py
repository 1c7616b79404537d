"""Epochs order owners, over the life of a consumer group and beyond it."""

from __future__ import annotations

import pytest

from holdfast.bus import NOTHING_OWNED, Ownership, TopicPartition
from holdfast.epochs import MAX_GENERATION, MAX_INCARNATION, NO_EPOCH, describe_epoch, epoch_of

HERE = TopicPartition("requests", 1)


def test_later_owners_have_higher_epochs() -> None:
    """Generations count within an incarnation, any incarnation is above all generations of the one before."""
    ordered = [
        epoch_of(0, 1),
        epoch_of(0, MAX_GENERATION),
        epoch_of(1, 0),
        epoch_of(1, 1),
        epoch_of(MAX_INCARNATION, 1),
    ]
    assert ordered == sorted(set(ordered))
    assert epoch_of(2, 17) == (2 << 32) + 17
    assert NO_EPOCH < epoch_of(0, 1)
    assert epoch_of(MAX_INCARNATION, MAX_GENERATION) < 1 << 63


@pytest.mark.parametrize(
    ("incarnation", "generation", "says"),
    [
        (-1, 1, "an incarnation is 0 to 2147483647, not -1"),
        (MAX_INCARNATION + 1, 1, "an incarnation is"),
        (0, -1, "generation is 0 to 2147483647, not -1: has the member joined"),
        (0, MAX_GENERATION + 1, "generation is"),
    ],
)
def test_what_no_epoch_can_be_made_of_is_refused(incarnation: int, generation: int, says: str) -> None:
    """A number outside its range would spill into the other's, and order owners wrongly."""
    with pytest.raises(ValueError, match=says):
        epoch_of(incarnation, generation)


def test_an_epoch_is_described_by_its_parts() -> None:
    """As incarnation and generation."""
    assert describe_epoch(epoch_of(2, 17)) == "2.17"


def test_work_is_kept_only_by_the_same_member_in_the_next_generation() -> None:
    """Whoever missed a rebalance, or was thrown out, cannot know who owned its partitions in between."""
    before = Ownership(frozenset({HERE}), 4, "a")
    after = [
        Ownership(frozenset({HERE, TopicPartition("requests", 2)}), 5, "a"),
        Ownership(frozenset({HERE}), 6, "a"),
        Ownership(frozenset({HERE}), 5, "b"),
        Ownership(frozenset(), 5, "a"),
    ]
    assert [sorted(each.kept_since(before)) for each in after] == [[HERE], [], [], []]
    assert not before.kept_since(NOTHING_OWNED)
    assert before.epoch == epoch_of(0, 4)
