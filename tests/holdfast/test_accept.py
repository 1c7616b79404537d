"""Rule R: examples of each verdict, and a randomised model of owners that die, freeze, wake up and start again."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from holdfast.accept import End, Epochs, Prefix, Ruling, Source, Verdict, extend_hash, judge

SOURCE = Source(request_class=1, partition=7)
TEXT = [11, 22, 33, 44, 55]
THREE = Prefix().extended(TEXT[:3])


def record(first: int, last: int, *, text: list[int] = TEXT, prefix: Prefix = THREE, end: End = End.OPEN) -> Ruling:
    """What becomes of text[first:last], as its writer would send it, where `prefix` is accepted."""
    return judge(
        prefix, first_index=first, token_ids=text[first:last], prefix_hash=extend_hash(0, text[:first]), end=end
    )


def test_the_hash_is_crc32_of_little_endian_words() -> None:
    """The hash of a prefix is CRC-32 over the tokens as four little-endian bytes each, and 0 for none."""
    assert extend_hash(0, []) == 0
    assert extend_hash(0, [1, 0x01020304]) == zlib.crc32(b"\x01\0\0\0\x04\x03\x02\x01")


def test_tokens_at_the_accepted_count_are_accepted() -> None:
    """Tokens whose index is the number accepted so far are accepted."""
    assert record(3, 5) == Ruling(Verdict.ACCEPTED, Prefix().extended(TEXT), 0, ends=False)


def test_the_tail_of_an_overlapping_record_is_accepted_where_the_overlap_fits() -> None:
    """Of a record that begins before the accepted count and ends after it, the new tokens are accepted."""
    assert record(1, 5) == Ruling(Verdict.ACCEPTED, Prefix().extended(TEXT), 2, ends=False)


def test_the_tail_of_an_overlapping_record_with_another_text_is_a_conflict() -> None:
    """A record that overlaps the accepted tokens with others is not accepted, its tail neither."""
    assert record(1, 5, text=[11, 22, 99, 44, 55]) == Ruling(Verdict.CONFLICT, THREE, 4, ends=False)


def test_a_prefix_hash_that_does_not_fit_is_a_conflict() -> None:
    """Tokens at the right index after another text are not accepted."""
    assert record(3, 5, text=[11, 22, 99, 44, 55]) == Ruling(Verdict.CONFLICT, THREE, 2, ends=False)


def test_what_was_accepted_before_is_known() -> None:
    """A record that ends at or before the accepted count changes nothing."""
    for first, last in ((0, 1), (0, 3), (2, 3), (3, 3)):
        assert record(first, last) == Ruling(Verdict.KNOWN, THREE, last - first, ends=False)


def test_a_record_beyond_the_accepted_count_is_a_gap() -> None:
    """Tokens that begin beyond the accepted count are not accepted."""
    assert record(4, 5) == Ruling(Verdict.GAP, THREE, 1, ends=False)


def test_an_end_by_tokens_holds_where_its_tokens_are_accepted() -> None:
    """A choice ends with its last token, also where that token came earlier, from an owner that died before the end."""
    assert record(3, 5, end=End.BY_TOKENS).ends
    assert record(2, 3, end=End.BY_TOKENS) == Ruling(Verdict.KNOWN, THREE, 1, ends=True)


def test_an_end_by_tokens_where_others_went_on_is_a_conflict() -> None:
    """An owner whose text ended before the accepted count wrote another text."""
    assert record(0, 2, end=End.BY_TOKENS) == Ruling(Verdict.CONFLICT, THREE, 2, ends=False)


def test_an_end_from_outside_always_holds() -> None:
    """Cancelled, out of time or failed is an end wherever it stands; the tokens beside it follow the rule."""
    assert record(0, 2, end=End.OUTRIGHT) == Ruling(Verdict.KNOWN, THREE, 2, ends=True)
    assert record(5, 5, end=End.OUTRIGHT) == Ruling(Verdict.GAP, THREE, 0, ends=True)
    assert record(3, 4, text=[1, 2, 3, 4], end=End.OUTRIGHT) == Ruling(Verdict.CONFLICT, THREE, 1, ends=True)
    assert record(3, 5, end=End.OUTRIGHT) == Ruling(Verdict.ACCEPTED, Prefix().extended(TEXT), 0, ends=True)


def test_a_lower_epoch_is_ignored_in_its_own_source_partition_only() -> None:
    """A record below the highest epoch of its source partition does not count; other partitions have their own."""
    epochs = Epochs()
    other = Source(request_class=2, partition=7)
    assert epochs.admit(SOURCE, 5)
    assert epochs.admit(SOURCE, 5)
    assert not epochs.admit(SOURCE, 4)
    assert epochs.admit(other, 4)
    assert epochs.admit(SOURCE, 1 << 32)
    assert (epochs.highest(SOURCE), epochs.highest(other), epochs.highest(Source(1, 0))) == (1 << 32, 4, 0)


def test_a_reader_that_begins_in_mid_log_knows_the_epoch_of_its_place() -> None:
    """What was met before the place is met, so a frozen owner's record behind it does not count."""
    met = {SOURCE: 5}
    epochs = Epochs(met)
    assert not epochs.admit(SOURCE, 4)
    assert epochs.admit(SOURCE, 6)
    assert met == {SOURCE: 5}, "it is the reader's own from here on"


tokens = st.lists(st.integers(0, 2), max_size=8)


@given(accepted=tokens, text=tokens, data=st.data())
def test_a_record_means_what_its_tokens_one_by_one_mean(
    accepted: list[int], text: list[int], data: st.DataObject
) -> None:
    """Judging a record is the same as judging a record for each of its tokens, up to the first that is refused."""
    first = data.draw(st.integers(0, len(text)))
    last = data.draw(st.integers(first, len(text)))
    prefix = Prefix().extended(accepted)
    whole = record(first, last, text=text, prefix=prefix)
    one_by_one, verdicts = prefix, set()
    for index in range(first, last):
        ruling = record(index, index + 1, text=text, prefix=one_by_one)
        one_by_one = ruling.prefix
        verdicts.add(ruling.verdict)
        if ruling.verdict in (Verdict.GAP, Verdict.CONFLICT):
            break
    assert whole.prefix == one_by_one
    if last > first:
        strongest = [Verdict.GAP, Verdict.CONFLICT, Verdict.ACCEPTED, Verdict.KNOWN]
        assert whole.verdict is next(verdict for verdict in strongest if verdict in verdicts)


CHOICES = 3
LENGTH = 12


@dataclass
class Record:
    """A record of the model's log; without parts it is an owner's marker."""

    owner: Owner
    parts: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(choice, first index, tokens)."""

    def ruling(self, part: tuple[int, int, list[int]], prefix: Prefix) -> Ruling:
        choice, first, ids = part
        text = self.owner.texts[choice]
        return judge(
            prefix,
            first_index=first,
            token_ids=ids,
            prefix_hash=extend_hash(0, text[:first]),
            end=End.BY_TOKENS if first + len(ids) == LENGTH else End.OPEN,
        )


@dataclass
class Owner:
    """An engine that owned the source partition under some epoch, and may believe so for ever."""

    epoch: int
    texts: list[list[int]]
    """What it would write in each choice, all of it."""
    written: list[int]
    """How much of it, it believes to be in the log."""

    def step(self, draw: random.Random) -> Record:
        """The next tokens of some of its choices."""
        result = Record(self)
        for choice, text in enumerate(self.texts):
            first = self.written[choice]
            count = min(draw.choice([0, 1, 1, 3]), LENGTH - first)
            if count:
                result.parts.append((choice, first, text[first : first + count]))
                self.written[choice] += count
        return result


@dataclass
class Reader:
    """Applies the rule, and keeps what it was shown."""

    epochs: Epochs = field(default_factory=Epochs)
    prefixes: list[Prefix] = field(default_factory=lambda: [Prefix()] * CHOICES)
    shown: list[list[int]] = field(default_factory=lambda: [[] for _ in range(CHOICES)])
    ended: set[int] = field(default_factory=set)
    refusals: list[Verdict] = field(default_factory=list)

    def read(self, record: Record) -> None:
        if not self.epochs.admit(SOURCE, record.owner.epoch):
            return
        for part in record.parts:
            choice, _, ids = part
            if choice in self.ended:
                continue
            ruling = record.ruling(part, self.prefixes[choice])
            if ruling.verdict in (Verdict.GAP, Verdict.CONFLICT):
                self.refusals.append(ruling.verdict)
            self.shown[choice] += ids[ruling.num_known :]
            self.prefixes[choice] = ruling.prefix
            assert ruling.prefix == Prefix().extended(self.shown[choice])
            if ruling.verdict is Verdict.ACCEPTED:
                count = len(self.shown[choice])
                assert self.shown[choice] == record.owner.texts[choice][:count], "one coherent text, its writer's"
            if ruling.ends:
                self.ended.add(choice)
                assert len(self.shown[choice]) == LENGTH


def write(draw: random.Random) -> list[int]:
    return [draw.randrange(3) for _ in range(LENGTH)]


def history(draw: random.Random, *, same_text: bool, scans: bool, losses: bool) -> list[Record]:
    """A log written by several owners, each with a higher epoch than the one before, all of whom may go on writing
    for ever. The last one finishes. `same_text`: whoever starts again samples the same tokens. `scans`: a new owner
    writes its marker and goes on from what a reader of the log up to it accepted; else it starts at 0."""
    owners = [Owner(draw.randrange(3), [write(draw) for _ in range(CHOICES)], [0] * CHOICES)]
    log: list[Record] = []
    for _ in range(draw.randrange(40)):
        event = draw.random()
        if event < 0.15:
            owners.append(successor(draw, owners, log, same_text=same_text, scans=scans))
        elif event < 0.25 and log:
            log.append(draw.choice(log))
        else:
            step = draw.choice(owners).step(draw)
            if not (losses and draw.random() < 0.2):
                log.append(step)
    while min(owners[-1].written) < LENGTH:
        log.append(owners[-1].step(draw))
    return log


def successor(draw: random.Random, owners: list[Owner], log: list[Record], *, same_text: bool, scans: bool) -> Owner:
    texts = owners[0].texts if same_text else [write(draw) for _ in range(CHOICES)]
    owner = Owner(owners[-1].epoch + draw.randrange(1, 3), texts, [0] * CHOICES)
    if scans:
        log.append(Record(owner))
        reader = Reader()
        for each in log:
            reader.read(each)
        owner.texts = [shown + text[len(shown) :] for shown, text in zip(reader.shown, texts, strict=True)]
        owner.written = [len(shown) for shown in reader.shown]
    return owner


seeds = st.integers(0, 1 << 32).map(random.Random)


@given(draw=seeds, same_text=st.booleans(), scans=st.booleans())
def test_what_is_shown_is_always_one_owners_text(draw: random.Random, same_text: bool, scans: bool) -> None:
    """Whatever zombies, duplicates, losses and second starts do to the log, each choice shows a beginning of the text of
    the owner accepted last (`Reader.read` asserts it)."""
    reader = Reader()
    for record in history(draw, same_text=same_text, scans=scans, losses=True):
        reader.read(record)


@given(draw=seeds)
def test_a_second_start_with_the_same_text_completes(draw: random.Random) -> None:
    """Where whoever starts again at 0 samples the same tokens, nothing is refused and every choice ends complete."""
    reader = Reader()
    for record in history(draw, same_text=True, scans=False, losses=False):
        reader.read(record)
    assert reader.refusals == []
    assert reader.ended == set(range(CHOICES))


@given(draw=seeds)
def test_a_takeover_that_goes_on_from_the_committed_prefix_completes(draw: random.Random) -> None:
    """Where a new owner marks the log and goes on from what the rule accepted up to its marker, nothing is refused and
    every choice ends complete, though its own continuation is another text."""
    reader = Reader()
    for record in history(draw, same_text=False, scans=True, losses=False):
        reader.read(record)
    assert reader.refusals == []
    assert reader.ended == set(range(CHOICES))


@given(draw=seeds)
def test_readers_that_start_at_the_beginning_agree(draw: random.Random) -> None:
    """A reader that comes later and reads the whole log has accepted what the live one had."""
    log = history(draw, same_text=False, scans=False, losses=True)
    live = Reader()
    for length, record in enumerate(log, 1):
        live.read(record)
        late = Reader()
        for earlier in log[:length]:
            late.read(earlier)
        assert (late.shown, late.ended) == (live.shown, live.ended)
