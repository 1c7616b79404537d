"""Rule R: which tokens a reader of the token topic accepts. Pure: no I/O, no clock, no messages.

An engine may die, freeze and wake up; a request may be delivered again to another engine, which starts anew or goes on
from where it knows the first one stood. So the log of one reply partition may hold the work of several owners of a
source partition, interleaved. All readers - the client's gateway, one that resumes a stream, a new owner that wants to
know what was committed - apply this one function to the records in log order, and so agree on every token:

    a record whose epoch is below the highest met from its source partition is ignored      (`Epochs.admit`)
    a token is accepted iff its index is the number accepted so far and the hash of all     (`judge`)
    tokens before it, as its writer knew them, is that of the accepted ones

A record of several tokens means exactly what as many records of one token would, one after the other: what lies before
the accepted count is known already, the tail is accepted iff the record's hash, extended over the part that is known,
fits. Nothing ever takes an accepted token back.

Two things cannot happen while the log keeps its promises and owners follow theirs: a **gap** (a record that begins
beyond the accepted count) and a **conflict** (a hash that does not fit: two owners wrote different texts). Neither is
accepted, and no later record of that owner can be, so whoever reads ends the stream with an error: an inconsistency is
never shown as text, and nobody waits for a continuation that cannot come.

The hash is CRC-32 (ISO-HDLC, as `zlib.crc32`) over the tokens, each as four little-endian bytes.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Source(NamedTuple):
    """A source partition: what an engine owns and an epoch belongs to."""

    request_class: int
    partition: int


class Place(NamedTuple):
    """A place in a reply partition from which the rule may be applied to what one source partition wrote.

    Whoever begins without the epoch would accept what a frozen owner wrote behind a marker that lies before the offset.
    With a later epoch than was met by then, it would ignore what belongs to the text. So the two are noted together:

    * a request's start: where its gateway stood in the log, and the highest epoch it had met, before it published;
    * a cursor: the oldest record with a token that the client has not got, and the epoch of that record; where there is
      none, the offset behind the last record that was read, and the highest epoch met.
    """

    offset: int
    epoch: int
    """The highest epoch met before the offset; 0 where none was."""


class Epochs:
    """The highest epoch met from each source partition, in one reply partition."""

    def __init__(self, highest: Mapping[Source, int] | None = None) -> None:
        """`highest`: what was met before the place where reading begins."""
        self._highest: dict[Source, int] = dict(highest or {})

    def admit(self, source: Source, epoch: int) -> bool:
        """Whether a record counts. Called once for each record, in log order, also for those without streams."""
        if epoch < self._highest.get(source, 0):
            return False
        self._highest[source] = epoch
        return True

    def highest(self, source: Source) -> int:
        """The highest epoch met; 0 where there was none."""
        return self._highest.get(source, 0)


def extend_hash(prefix_hash: int, token_ids: Sequence[int]) -> int:
    """The hash of a prefix with these tokens after it. The hash of no tokens is 0."""
    return zlib.crc32(struct.pack(f"<{len(token_ids)}I", *token_ids), prefix_hash)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens of one choice up to some index: how many they are and what they hash to."""

    count: int = 0
    hash: int = 0

    def extended(self, token_ids: Sequence[int]) -> Prefix:
        """This prefix with more tokens after it."""
        return Prefix(self.count + len(token_ids), extend_hash(self.hash, token_ids))


class End(enum.Enum):
    """What a record says about the end of its choice."""

    OPEN = "open"
    """More may come."""
    BY_TOKENS = "by tokens"
    """The last token ended it (a stop token, or the most tokens allowed): holds only where that token is accepted."""
    OUTRIGHT = "outright"
    """It was ended from outside (cancelled, out of time, failed), whatever its tokens are: always holds."""


class Verdict(enum.Enum):
    """What becomes of a record's tokens."""

    ACCEPTED = "accepted"
    """They, or their tail, go on where the accepted ones end."""
    KNOWN = "known"
    """All of them were accepted before, as far as one can see."""
    GAP = "gap"
    """They begin beyond what is accepted: something between is missing."""
    CONFLICT = "conflict"
    """Their writer held other tokens before them than the accepted ones, or ended where others went on."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What `judge` decided."""

    verdict: Verdict
    prefix: Prefix
    """What is accepted now."""
    num_known: int
    """How many of the record's tokens, at its beginning, are not new; all of them unless the verdict is ACCEPTED."""
    ends: bool
    """Whether the choice ended: of it nothing must be judged any more."""


def judge(
    prefix: Prefix, *, first_index: int, token_ids: Sequence[int], prefix_hash: int, end: End = End.OPEN
) -> Ruling:
    """Applies the rule to one choice's part of an admitted record.

    `prefix` is what is accepted so far, `first_index` the index of the first of `token_ids`, `prefix_hash` the hash of
    the tokens before it as the writer knows them.
    """
    num_before = prefix.count - first_index
    if num_before < 0:
        return _refused(Verdict.GAP, prefix, token_ids, end)
    if num_before > len(token_ids):  # too far back to compare; but an end there contradicts the tokens after it
        verdict = Verdict.CONFLICT if end is End.BY_TOKENS else Verdict.KNOWN
        return _refused(verdict, prefix, token_ids, end)
    if extend_hash(prefix_hash, token_ids[:num_before]) != prefix.hash:
        return _refused(Verdict.CONFLICT, prefix, token_ids, end)
    verdict = Verdict.ACCEPTED if num_before < len(token_ids) else Verdict.KNOWN
    return Ruling(verdict, prefix.extended(token_ids[num_before:]), num_before, end is not End.OPEN)


def _refused(verdict: Verdict, prefix: Prefix, token_ids: Sequence[int], end: End) -> Ruling:
    return Ruling(verdict, prefix, len(token_ids), end is End.OUTRIGHT)
