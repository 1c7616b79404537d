"""The sequences that wait, which hold no slot and no block: in line, or until blocks of their prefix are loaded."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

from services.engine.sequence import Phase, Sequence


class Line:
    """Sequences in their order: interactive ones first, then by arrival."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Over a copy, so that the line may change meanwhile."""
        return iter(self._sequences[:])

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[self._index(sequence)]

    @property
    def first(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    @property
    def youngest(self) -> Sequence | None:
        return self._sequences[-1] if self._sequences else None

    def behind(self, sequence: Sequence) -> list[Sequence]:
        """Those that come after this one."""
        return self._sequences[self._index(sequence) + 1 :]

    def _index(self, sequence: Sequence) -> int:
        index = bisect_left(self._sequences, sequence.order, key=_order)
        assert self._sequences[index] is sequence
        return index


def _order(sequence: Sequence) -> tuple[bool, float, int]:
    return sequence.order


class Waiting:
    """A line for each class, and those that are loading beside them."""

    def __init__(self) -> None:
        self._interactive = Line()
        self._batch = Line()
        self._loading: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._interactive) + len(self._batch) + len(self._loading)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._interactive, self._batch, self._loading)

    def add(self, sequence: Sequence) -> None:
        """It takes its place in line."""
        sequence.phase = Phase.WAITING
        self._line_of(sequence).add(sequence)

    def load(self, sequence: Sequence) -> None:
        """It stands in no line until it is removed and added again."""
        sequence.phase = Phase.LOADING
        self._loading.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.LOADING:
            self._loading.remove(sequence)
        else:
            self._line_of(sequence).remove(sequence)

    @property
    def heads(self) -> list[Sequence]:
        """The first in line of each class, the interactive one in front."""
        return [head for line in (self._interactive, self._batch) if (head := line.first)]

    @property
    def ready(self) -> list[Sequence]:
        """The first of each class that may be admitted, the interactive one in front."""
        return [head for line in (self._interactive, self._batch) if (head := _first_ready(line))]

    def _line_of(self, sequence: Sequence) -> Line:
        return self._interactive if sequence.interactive else self._batch


def _first_ready(line: Line) -> Sequence | None:
    """The first that may be admitted: no step in flight computes anything of it, and where it shares a prompt, that is
    computed."""
    return next((s for s in line if not s.num_in_flight and _prompt_is_shared(s)), None)


def _prompt_is_shared(sequence: Sequence) -> bool:
    first = sequence.shares_prompt_with
    return first is None or first.is_finished or bool(first.output_ids)
