"""Epochs: which of two owners of a source partition came later.

    epoch = (incarnation << 32) + generation

The generation is the consumer group's: it rises with every rebalance, and no partition changes hands without one. It
starts again where the group is made anew; whoever runs the engines then raises the incarnation, and so epochs never
fall. They are compared as numbers. An owner's epoch is that of the rebalance in which it **gained** the partition: it
stays the same through rebalances in which the owner keeps it, for nobody else can have owned it in between.
"""

from __future__ import annotations

GENERATION_BITS = 32

MAX_GENERATION = (1 << 31) - 1
"""A broker counts generations in 32 bits with a sign."""

MAX_INCARNATION = (1 << 31) - 1
"""So that an epoch fits 63 bits, and every language's integers."""

NO_EPOCH = 0
"""Below every owner's epoch: nobody has written yet, as far as one knows."""


def epoch_of(incarnation: int, generation: int) -> int:
    """The epoch of what is gained in this generation; `NO_EPOCH` in incarnation 0 before the first one.

    Raises:
        ValueError: one of the two is outside its range.
    """
    if not 0 <= incarnation <= MAX_INCARNATION:
        raise ValueError(f"an incarnation is 0 to {MAX_INCARNATION}, not {incarnation}")
    if not 0 <= generation <= MAX_GENERATION:
        raise ValueError(f"a group's generation is 0 to {MAX_GENERATION}, not {generation}: has the member joined?")
    return (incarnation << GENERATION_BITS) + generation


def describe_epoch(epoch: int) -> str:
    """An epoch for people: `2.17` is generation 17 of incarnation 2."""
    return f"{epoch >> GENERATION_BITS}.{epoch & ((1 << GENERATION_BITS) - 1)}"
