"""How far the engine is in each partition it owns: what it may commit, as `holdfast/committed.py` writes it. A new owner
reads on from the watermark and skips what is done above it; what was begun and not done it begins again. What the text beside
a position has no room for is answered again, and ignored by whoever reads the tokens.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from holdfast.bus import Position, TopicPartition
from holdfast.committed import Committed


@dataclass(slots=True)
class _Progress:
    """One partition's records from the watermark on."""

    open: set[int] = field(default_factory=set)
    """Begun and not done."""
    done: set[int] = field(default_factory=set)
    """Done, at or above the watermark."""
    next: int = 0
    """The offset behind the last record that was begun."""
    committed: Position | None = None

    @property
    def watermark(self) -> int:
        return min(self.open, default=self.next)

    def position(self) -> Position:
        done = self._ranges()
        begun = max(self.next, done[-1][1] + 1) if done else self.next  # an earlier owner may have been further
        return Committed(self.watermark, begun, done).position()

    def begin(self, offset: int) -> bool:
        known = offset in self.open or offset in self.done or offset < self.watermark
        self.next = max(self.next, offset + 1)
        if not known:
            self.open.add(offset)
        elif not self.open:
            self._forget_below(self.watermark)
        return not known

    def finish(self, offset: int) -> None:
        self.open.remove(offset)
        self.done.add(offset)
        if offset < self.watermark:
            self._forget_below(self.watermark)

    def _forget_below(self, watermark: int) -> None:
        self.done = {offset for offset in self.done if offset >= watermark}

    def _ranges(self) -> list[tuple[int, int]]:
        """First and last offset of each run of records done above the watermark. Offsets that are no records do not
        part a run, once all before its end was read: until then one between may be a record that is not done."""
        ranges: list[tuple[int, int]] = []
        open_in_order = sorted(self.open)
        for offset in sorted(self.done):
            if ranges and self._joins(ranges[-1][1], offset, open_in_order):
                ranges[-1] = (ranges[-1][0], offset)
            else:
                ranges.append((offset, offset))
        return ranges

    def _joins(self, last: int, offset: int, open_in_order: list[int]) -> bool:
        nothing_open_between = bisect_left(open_in_order, last) == bisect_left(open_in_order, offset)
        return offset == last + 1 or (offset < self.next and nothing_open_between)


class Commits:
    """The progress in all partitions that this engine owns."""

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Progress] = {}
        self.changed = asyncio.Event()
        """Set when something may be due; whoever commits clears it."""

    def gain(self, partition: TopicPartition, committed: Position | None) -> None:
        """The partition is ours from now on; what was committed of it before."""
        progress = self._partitions[partition] = _Progress(committed=committed)
        if committed is not None:
            progress.next = committed.offset
            ranges = Committed.of(committed).done
            progress.done = {offset for first, last in ranges for offset in range(first, last + 1)}

    def lose(self, partitions: Collection[TopicPartition]) -> None:
        """They are another engine's now."""
        for partition in partitions:
            self._partitions.pop(partition, None)

    def begin(self, partition: TopicPartition, offset: int) -> bool:
        """A record was read. False where it was begun or done before: after a rebalance records come again."""
        is_new = self._partitions[partition].begin(offset)
        if is_new:
            self.changed.set()
        return is_new

    def finish(self, partition: TopicPartition, offset: int) -> None:
        """The record's last answer is in the log. Does nothing where the partition was lost meanwhile."""
        progress = self._partitions.get(partition)
        if progress is not None and offset in progress.open:
            progress.finish(offset)
            self.changed.set()

    def due(self) -> dict[TopicPartition, Position]:
        """The positions that are not committed yet."""
        positions = {partition: progress.position() for partition, progress in self._partitions.items()}
        return {
            partition: position
            for partition, position in positions.items()
            if position != (self._partitions[partition].committed or Position(0))
        }

    def committed(self, positions: Mapping[TopicPartition, Position]) -> None:
        """The group has these now."""
        for partition, position in positions.items():
            if partition in self._partitions:
                self._partitions[partition].committed = position
