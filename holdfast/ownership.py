"""What an engine does as the owner of a source partition, as a state machine. Pure: no I/O, no clock, no messages.

A `Tenure` is one engine's time as the owner of one source partition, under one epoch. It says what is to be done, is
told what was done, and says which requests may be answered, and from which token on:

    partition gained
    request delivered                                              `meet`
                               ▼
                         marker into its reply partition           `take_markers`
                               │ acked                             `marked`
                               ▼
                         scan, from the smallest start of the      `take_scans`, `Scan.feed`
                         requests that wait up to the marker
                               │ done                              `scanned`
              a higher epoch?  ├──► the tenure is over: another engine owns the partition
                               ▼
                         claimed: the request's standing is known  `take_claims`; only now `may_emit`

Reply partitions do not wait for one another; one that no request names gets no marker.

**Why up to the own marker.** What an earlier owner wrote before the marker, all readers accept; what it writes behind
it, all ignore. So what the rule accepts up to the marker is the committed prefix, for everybody and for ever.

**Which requests need a scan.** A request says from where its answer is read: an offset, and the highest epoch its
gateway had met by then (`Place`). If that epoch is the tenure's own, all readers of the request ignore every earlier
owner from its first record on, so it is new: nothing can be committed. If it is lower, an earlier owner's word would
count, and the request is scanned from its offset to a marker that lies at or behind it; where there is no such marker
(the gateway started since, and knows none), another one is written. If it is higher, the tenure is over.
This holds for every request, whenever it is delivered: a backlog may be taken piece by piece.

**Which requests are given up.** Some request may be what ends engines. So an owner announces that it begins one, by an
entry without tokens, and where the request is not new it begins only once the log has that. A scan counts the epochs that
began a request in vain: since the last one that got on with it. Owners alone would be the wrong thing to count, for a
restart of all engines moves a long answer through the hands of each; and an owner that lost a request, or leaves, and
lives, says so. A request that was begun in vain before is a **suspect**, and suspects are begun one at a time: else those that died with a poison would die with it again.

**Epochs must never be used twice.** They are not, as long as whoever makes the consumer group anew raises the
incarnation. Where somebody forgot, a scan may meet a higher epoch than the own one, or tokens under the own epoch before
the own marker. Both end the tenure: nobody answers then, rather than two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from holdfast.accept import End, Epochs, Place, Prefix, Source, Verdict
from holdfast.epochs import NO_EPOCH
from holdfast.records import Batch, Entry

MAX_STARTS = 3
"""A request that so many epochs began in vain, one after the other, is given to nobody any more: it may be what ends
engines."""

PROOF = 2
"""With so many tokens of one choice an owner has got on with a request. The first comes of computing what is known of
it, the second of going on from there: what an engine dies of may lie in either."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request, as far as its ownership goes."""

    request_id: str
    reply_partition: int
    start: Place
    """From where its answer is read."""
    num_choices: int


@dataclass(slots=True)
class Choice:
    """One choice, as every reader of the log up to the marker has it."""

    token_ids: list[int] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)
    """Of `token_ids`."""
    has_ended: bool = False

    def take(self, entry: Entry) -> Verdict:
        """Applies the rule to an admitted entry."""
        ruling = entry.judged(self.prefix)
        self.token_ids += entry.token_ids[ruling.num_known :]
        self.prefix = ruling.prefix
        self.has_ended = ruling.ends
        return ruling.verdict


@dataclass(slots=True)
class Standing:
    """What is committed of a request."""

    choices: list[Choice]
    is_new: bool = False
    """Whether nobody else can have begun it."""
    vain: set[int] = field(default_factory=set)
    """The epochs that began it, and may have died of it, since one got on: that wrote an entry of it, be it one without
    tokens, be it ignored, but neither `PROOF` tokens of a choice nor that they let go of it."""
    contradiction: str = ""
    """Why no reader goes on with it, where the log contradicts itself. Such a request must be ended outright."""
    _first: dict[tuple[int, int], int] = field(default_factory=dict)
    """By epoch and choice, from which token on it was begun."""
    _alive: set[int] = field(default_factory=set)
    """The epochs that did not die of it: they got on with it, or let go."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do."""
        return all(choice.has_ended for choice in self.choices)

    @property
    def is_suspect(self) -> bool:
        """Whether an engine may have died of it."""
        return bool(self.vain)

    @property
    def is_exhausted(self) -> bool:
        """Whether it was begun in vain too often to be begun again."""
        return not self.has_ended and len(self.vain) >= MAX_STARTS

    def take(self, entry: Entry, epoch: int, *, is_admitted: bool) -> None:
        """The next entry. Whoever wrote it has begun; only what is admitted counts otherwise."""
        self._count(entry, epoch, is_admitted=is_admitted)
        if is_admitted and not self.contradiction:
            self._accept(entry)

    def _count(self, entry: Entry, epoch: int, *, is_admitted: bool) -> None:
        """One that got on is not counted, accepted or not: it did not die of the request. Where it is accepted, neither
        is who came before: from here on the request is another one."""
        gets_on = not entry.lets_go and self._gets_on(entry, epoch)
        if gets_on or entry.lets_go:
            self._alive.add(epoch)
        if epoch not in self._alive:
            self.vain.add(epoch)
        elif gets_on and is_admitted:
            self.vain.clear()
        else:
            self.vain.discard(epoch)

    def _gets_on(self, entry: Entry, epoch: int) -> bool:
        first = self._first.setdefault((epoch, entry.choice), entry.first_index)
        num_told = entry.first_index + len(entry.token_ids) - first
        return num_told >= PROOF or bool(entry.token_ids and entry.end is End.BY_TOKENS)

    def _accept(self, entry: Entry) -> None:
        if entry.choice >= len(self.choices):
            self.contradiction = f"the log holds tokens of choice {entry.choice} of {len(self.choices)}"
            return
        choice = self.choices[entry.choice]
        if choice.has_ended:
            return
        verdict = choice.take(entry)
        if verdict in (Verdict.GAP, Verdict.CONFLICT) and not choice.has_ended:
            self.contradiction = (
                f"choice {entry.choice}: tokens from {entry.first_index} on are a {verdict.value} "
                f"where {choice.prefix.count} are accepted"
            )


@dataclass(slots=True)
class _Run:
    """Neighbouring records of the source partition that have one epoch."""

    epoch: int
    last: int
    """Offset of the last of them."""
    entries: dict[str, list[tuple[int, Entry]]] = field(default_factory=dict)
    """By request, with the offsets of their records."""


class Scan:
    """What one reply partition holds of one source partition, from an offset up to a marker.

    It keeps the entries of every request in its range, also of those that are not known yet: they may be delivered
    later, and each is judged from its own start.
    """

    def __init__(self, source: Source, *, reply_partition: int, start: int, marker: int) -> None:
        assert start <= marker
        self.source = source
        self.reply_partition = reply_partition
        self.start = start
        """Offset to read from."""
        self.marker = marker
        """Offset of the last record to read."""
        self.is_done = False
        """Whether the marker was read."""
        self.highest = NO_EPOCH
        """The highest epoch met."""
        self.kept_from = 0
        """Offset from which on the log still has records."""
        self._runs: list[_Run] = []
        self._fed = -1

    def feed(self, offset: int, batch: Batch | None) -> None:
        """The next record; None where it is another source's. What lies behind the marker is ignored, and what was fed before,
        so that reading may begin again."""
        if offset <= self._fed:
            return
        self._fed = offset
        if offset <= self.marker and batch is not None and batch.source == self.source:
            self._keep(offset, batch)
        self.is_done = self.is_done or offset >= self.marker

    def covers(self, request: Accepted) -> bool:
        """Whether what is committed of a request can be told from this scan."""
        return self.is_done and self.start <= request.start.offset <= self.marker

    def standing(self, request: Accepted) -> Standing:
        """What is committed of a request that is covered."""
        assert self.covers(request)
        if request.start.offset < self.kept_from:
            return Standing(
                [Choice() for _ in range(request.num_choices)],
                contradiction="the log no longer holds the beginning of its answer",
            )
        epochs = Epochs({self.source: request.start.epoch})
        standing = Standing([Choice() for _ in range(request.num_choices)])
        for run in self._runs:
            if run.last < request.start.offset:
                continue
            entries = [
                entry for offset, entry in run.entries.get(request.request_id, ()) if offset >= request.start.offset
            ]
            is_admitted = epochs.admit(self.source, run.epoch)
            for entry in entries:
                standing.take(entry, run.epoch, is_admitted=is_admitted)
        return standing

    def has_entries(self, epoch: int, *, before: int) -> bool:
        """Whether anybody wrote tokens under this epoch before this offset."""
        return any(
            offset < before
            for run in self._runs
            if run.epoch == epoch
            for entries in run.entries.values()
            for offset, _ in entries
        )

    def _keep(self, offset: int, batch: Batch) -> None:
        self.highest = max(self.highest, batch.epoch)
        if not self._runs or self._runs[-1].epoch != batch.epoch:
            self._runs.append(_Run(batch.epoch, offset))
        run = self._runs[-1]
        run.last = offset
        for entry in batch.entries:
            run.entries.setdefault(entry.request_id, []).append((offset, entry))


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that may be answered, from its standing on."""

    request: Accepted
    standing: Standing


@dataclass(slots=True)
class _Lane:
    """Where the claim stands in one reply partition."""

    marker: int | None = None
    """Offset of the newest own marker that was acked."""
    first_marker: int = 0
    """Offset of the first one: nothing was emitted before it."""
    is_marking: bool = False
    marked_for: frozenset[str] = frozenset()
    """Requests that waited when the newest marker was taken: it must lie behind their starts."""
    is_scanning: bool = False
    scan: Scan | None = None
    """The newest that is done, as long as requests are delivered that it tells of. It holds the tokens of all."""
    scanned: int | None = None
    """Offset of the marker up to which that went."""
    waiting: dict[str, Accepted] = field(default_factory=dict)
    """Requests that cannot be claimed yet, by id."""

    def needs_marker(self) -> bool:
        """Whether a request waits for one: for the first, or for one behind its start."""
        marker = self.marker
        return not self.is_marking and any(
            marker is None or each.start.offset > marker for each in self.waiting.values()
        )

    def next_scan(self, source: Source, reply_partition: int) -> Scan | None:
        """The scan that is to be made now, for all requests that can be scanned at once."""
        marker = self.marker
        if self.is_scanning or marker is None:
            return None
        starts = [each.start.offset for each in self.waiting.values() if each.start.offset <= marker]
        if not starts:
            return None
        return Scan(source, reply_partition=reply_partition, start=min(starts), marker=marker)


class Tenure:
    """One engine's time as the owner of one source partition."""

    def __init__(self, source: Source, epoch: int, reply_partitions: Iterable[int]) -> None:
        """`epoch`: that of the rebalance in which the partition was gained. It is written into every record, also after
        rebalances in which the partition was kept."""
        assert epoch > NO_EPOCH
        self.source = source
        self.epoch = epoch
        self.outbid_by = NO_EPOCH
        """The epoch that was met and ended the tenure: a higher one, or its own in another's hand. Where the group still
        gives the partition to this engine, its generation started again without a higher incarnation."""
        self.is_over = False
        self._lanes = {reply_partition: _Lane() for reply_partition in reply_partitions}
        self._known: set[str] = set()
        self._claimed: set[str] = set()
        self._claims: list[Claim] = []

    @property
    def marker(self) -> Batch:
        """The record that says whose the partition is now."""
        return Batch(self.source, self.epoch)

    def meet(self, request: Accepted) -> bool:
        """A request was delivered. False where it was met before: after a rebalance requests are delivered again.

        Raises:
            ValueError: there is no such reply partition.
        """
        lane = self._lanes.get(request.reply_partition)
        if lane is None:
            raise ValueError(f"there is no reply partition {request.reply_partition}")
        if request.request_id in self._known:
            return False
        self._known.add(request.request_id)
        if lane.scan is not None and lane.scan.marker < request.start.offset:
            lane.scan = None  # those to come are newer too; one that is not is scanned for again
        if self.is_over:
            return True
        if request.start.epoch > self.epoch:
            self._give_up(request.start.epoch)
        else:
            lane.waiting[request.request_id] = request
            self._settle(lane)
        return True

    def forget(self, request_id: str) -> None:
        """A request was answered, and its offset is known to be: it is not held any more."""
        self._known.discard(request_id)
        self._claimed.discard(request_id)

    def take_markers(self) -> list[int]:
        """The reply partitions into which the marker is to be written now. It must be queued behind what this engine
        has written there before, and sent until it is acked."""
        due = [number for number, lane in self._lanes.items() if lane.needs_marker()] if not self.is_over else []
        for number in due:
            lane = self._lanes[number]
            lane.is_marking, lane.marked_for = True, frozenset(lane.waiting)
        return due

    def marked(self, reply_partition: int, offset: int) -> None:
        """The log has the marker, at this offset."""
        lane = self._lanes[reply_partition]
        assert lane.is_marking
        if lane.marker is None:
            lane.first_marker = offset
        lane.is_marking, lane.marker = False, offset
        self._settle(lane)

    def take_scans(self) -> list[Scan]:
        """The scans that are to be made now: at most one at a time in each reply partition. Each is fed the records
        from its start on, in order, until it is done."""
        if self.is_over:
            return []
        due = [lane.next_scan(self.source, number) for number, lane in self._lanes.items()]
        for scan in filter(None, due):
            self._lanes[scan.reply_partition].is_scanning = True
        return [scan for scan in due if scan is not None]

    def scanned(self, scan: Scan) -> None:
        """A scan is done."""
        assert scan.is_done
        lane = self._lanes[scan.reply_partition]
        assert lane.is_scanning
        lane.is_scanning, lane.scan, lane.scanned = False, scan, scan.marker
        if scan.highest > self.epoch or scan.has_entries(self.epoch, before=lane.first_marker):
            self._give_up(scan.highest)
        self._settle(lane)

    def take_claims(self) -> list[Claim]:
        """The requests that may be answered from now on, and were not taken yet."""
        claims, self._claims = self._claims, []
        return claims

    def may_emit(self, request_id: str) -> bool:
        """Whether a record may say something about a request."""
        return not self.is_over and request_id in self._claimed

    def end(self) -> None:
        """The partition is lost: nothing may be written for it any more."""
        self.is_over = True
        self._claims.clear()

    def _give_up(self, higher: int) -> None:
        self.outbid_by = max(self.outbid_by, higher)
        self.end()

    def _settle(self, lane: _Lane) -> None:
        """Claims what waits and need not wait any more."""
        for request in [] if self.is_over else list(lane.waiting.values()):
            standing = self._standing(lane, request)
            if standing is not None:
                del lane.waiting[request.request_id]
                self._claimed.add(request.request_id)
                self._claims.append(Claim(request, standing))

    def _standing(self, lane: _Lane, request: Accepted) -> Standing | None:
        """A request's standing; None where it is not known yet."""
        marker, scan = lane.marker, lane.scan
        if marker is not None and marker < request.start.offset and request.start.epoch == self.epoch:
            return Standing([Choice() for _ in range(request.num_choices)], is_new=True)
        if marker is not None and marker < request.start.offset and self._was_marked_for(lane, request):
            return Standing(
                [Choice() for _ in range(request.num_choices)],
                contradiction="the log ends before the beginning of its answer: it has lost records, or was made anew",
            )
        return scan.standing(request) if scan is not None and scan.covers(request) else None

    def _was_marked_for(self, lane: _Lane, request: Accepted) -> bool:
        """Whether the newest marker was written after the request was met. Then a log that lost nothing has it behind the start."""
        return not lane.is_marking and request.request_id in lane.marked_for
