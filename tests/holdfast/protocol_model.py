"""A randomised model of the log's protocol: engines that die, freeze and wake up around the real `holdfast.ownership`.

    python -m tests.holdfast.protocol_model --runs 100000 --seed 1

One run is one `World`: reply partitions and source partitions, a consumer group, engines, gateways, and a scheduler
that picks what happens next at random. Each run draws which faults it has, so that some have few and others all:

* engines crash; freeze, and wake up as zombies that fetch, compute and write until the group tells them;
* records are on their way for any time, also behind the next owner's marker and after their writer's death; a failed
  send leaves some of them in the log, and all are sent again;
* the group throws out who is alive, moves partitions about, and is made anew (its generation starts again); owners that
  do not hear of it work on beside their successors;
* requests lie published or unpublished, are delivered again, cancelled, and have several choices; some are poison, and
  whoever computes them dies: at once, some tokens on, or of the step after its first;
* gateways lag behind the log, and start again at its end, knowing nothing; readers begin at a cursor or at a start.

Nothing that engines write is determined: every token is a new number, and the model knows which token its writer took
to be the one before. So a text that two owners mixed without knowing of each other shows at once. At the end faults
cease, whoever lives goes on, and everything must come to an end (`World.check`), poison after few more deaths. Some runs
have no fault but one poison: there every other request must come to its own end.

`Variant` names protocols that are known to be wrong. The model must find their faults: else it is blind.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from holdfast.accept import End, Epochs, Place, Prefix, Source, Verdict
from holdfast.bus import NOTHING_OWNED, Ownership, TopicPartition
from holdfast.ownership import MAX_STARTS, PROOF, Accepted, Choice, Claim, Scan, Standing, Tenure
from holdfast.records import Batch, Entry
from services.engine.trials import Trials


class Variant(enum.Enum):
    """A protocol."""

    OURS = "ours"
    INDEX_ONLY = "no epochs: start again from 0, readers know tokens by their index alone"
    FRESH_UNMARKED = "no marker and no scan for requests that nothing is known of"
    EMITS_EARLY = "the scan ends where the log does, before the own marker is in it"
    LAST_MARKER = "the last marker in the log wins, instead of the highest epoch"
    SAME_INCARNATION = "the group's generation starts again, and nobody raises the incarnation"
    KEEPS_BLINDLY = "work is kept for every partition that is owned before and after, whatever was in between"
    JOINS_OUTDATED = "engines that still have the old incarnation join the group that was made anew"
    START_WITHOUT_EPOCH = "a request says its start's offset, but not the epoch that its gateway had met"
    CURSOR_WITHOUT_EPOCH = "a cursor says an offset, but not the epoch"
    CURSOR_OF_NEWEST_EPOCH = "a cursor has the newest epoch met, though its offset lies before that"
    CURSOR_WITHOUT_ENDS = "a cursor does not say which choices have ended"
    COUNTS_OWNERS = "owners are counted as starts in vain, whether or not the request got on"
    ONE_TOKEN_IS_PROOF = "a request got on that got one token"
    BEGINS_UNANNOUNCED = "an inherited request begins before the log has its announcement"
    SUSPECTS_TOGETHER = "suspects begin all at once"
    LEAVES_SILENTLY = "an owner that loses a request, and lives, does not say so"


class Fault(Exception):
    """A promise that was broken."""


# Readers.


@dataclass(frozen=True)
class Cursor:
    """Where a client stands in a stream."""

    place: Place
    prefixes: tuple[Prefix, ...]
    texts: tuple[tuple[int, ...], ...]
    """What the client has; no part of a real cursor."""
    ended: tuple[bool, ...]


@dataclass
class Followed:
    """One choice of a stream, as one reader has it."""

    text: list[int]
    prefix: Prefix
    ended: bool
    first_count: int = 0
    """How many tokens it began with."""
    records: list[tuple[int, int, int, bool]] = field(default_factory=list)
    """(offset, epoch, accepted count after it, whether it ended the choice) of each record that said something new."""


class Stream:
    """One request, as one reader has it."""

    def __init__(self, world: World, request: Accepted, cursor: Cursor | None = None) -> None:
        self.world = world
        self.request = request
        if cursor is None:
            self.choices = [Followed([], Prefix(), False) for _ in range(request.num_choices)]
        else:
            self.choices = [
                Followed(list(text), prefix, ended, len(text))
                for text, prefix, ended in zip(cursor.texts, cursor.prefixes, cursor.ended, strict=True)
            ]

    @property
    def has_ended(self) -> bool:
        return all(choice.ended for choice in self.choices)

    @property
    def state(self) -> list[tuple[list[int], bool]]:
        return [(choice.text, choice.ended) for choice in self.choices]

    def take(self, offset: int, epoch: int, entry: Entry) -> None:
        """What `services.gateway.choice.Choice.accept` does, and the checks."""
        choice = self.choices[entry.choice]
        if choice.ended:
            return
        if self.world.variant is Variant.INDEX_ONLY:
            count, end = len(choice.text), entry.first_index + len(entry.token_ids)
            new = entry.token_ids[count - entry.first_index :] if entry.first_index <= count < end else []
            ends = entry.end is not End.OPEN and end >= count
        else:
            ruling = entry.judged(choice.prefix)
            if ruling.verdict in (Verdict.GAP, Verdict.CONFLICT):
                raise Fault(f"refused: a {ruling.verdict.value}, and the stream breaks")
            choice.prefix, new, ends = ruling.prefix, entry.token_ids[ruling.num_known :], ruling.ends
        for token in new:
            if self.world.parents[token] != (choice.text[-1] if choice.text else 0):
                raise Fault("incoherent: a token after others than its writer knew")
            choice.text.append(token)
        if ends:
            if entry.first_index + len(entry.token_ids) != len(choice.text):
                raise Fault("lost: ended elsewhere than its writer thought")
            choice.ended = True
        if new or ends:
            choice.records.append((offset, epoch, len(choice.text), ends))

    def cursor(self, reader: Reader) -> Cursor:
        """That of a client which has taken any part of what this reader has."""
        parts = [self._taken(choice) for choice in self.choices]
        unread = [place for _, _, place in parts if place is not None]
        highest = reader.highest(self.world.source_of[self.request.request_id])
        place = min(unread, default=Place(reader.position, highest))
        self.world.events["cursors with an epoch below the newest"] += place.epoch < highest
        ended = [end for _, end, _ in parts]
        match self.world.variant:
            case Variant.CURSOR_WITHOUT_EPOCH:
                place = Place(place.offset, 0)
            case Variant.CURSOR_OF_NEWEST_EPOCH:
                place = Place(place.offset, highest)
            case Variant.CURSOR_WITHOUT_ENDS:
                ended = [False] * len(ended)
        texts = tuple(tuple(text) for text, _, _ in parts)
        return Cursor(place, tuple(Prefix().extended(text) for text in texts), texts, tuple(ended))

    def _taken(self, choice: Followed) -> tuple[list[int], bool, Place | None]:
        """The tokens taken, whether the end was, and the oldest record with something that was not."""
        rng = self.world.rng
        count = rng.choice([len(choice.text), rng.randint(choice.first_count, len(choice.text))])
        came_ended = choice.ended and not choice.records
        ended = came_ended or (choice.ended and count == len(choice.text) and rng.random() < 0.7)
        left = [each for each in choice.records if each[2] > count or (each[3] and not ended)]
        return choice.text[:count], ended, Place(*left[0][:2]) if left else None


class Reader:
    """Reads one reply partition: a gateway, or whoever resumes one stream."""

    def __init__(self, world: World, reply_partition: int, position: int, met: dict[Source, int]) -> None:
        self.world = world
        self.log = world.logs[reply_partition]
        self.position = position
        self.epochs = Epochs(met)
        self.last_marker = dict(met)
        self.streams: dict[str, Stream] = {}

    def highest(self, source: Source) -> int:
        """The epoch of a place that this reader notes now."""
        if self.world.variant is Variant.LAST_MARKER:
            return self.last_marker.get(source, 0)
        return self.epochs.highest(source)

    def read(self, until: int | None = None) -> Reader:
        """Reads up to an offset, or the log's end."""
        until = len(self.log) if until is None else until
        while self.position < until:
            self._take(self.position, self.log[self.position])
            self.position += 1
        return self

    def _take(self, offset: int, batch: Batch) -> None:
        if not self._admits(batch):
            self.world.events["records ignored by readers"] += 1
            return
        for entry in batch.entries:
            stream = self.streams.get(entry.request_id)
            if stream is not None:
                stream.take(offset, batch.epoch, entry)

    def _admits(self, batch: Batch) -> bool:
        if self.world.variant is Variant.INDEX_ONLY:
            return True
        if self.world.variant is Variant.LAST_MARKER:
            if not batch.entries:
                self.last_marker[batch.source] = batch.epoch
            return batch.epoch == self.last_marker.setdefault(batch.source, batch.epoch)
        return self.epochs.admit(batch.source, batch.epoch)


# Owners.


class Naive(Tenure):
    """Takes some requests as new without having looked."""

    world: World

    def marked(self, reply_partition: int, offset: int) -> None:
        super().marked(reply_partition, offset)
        self._lanes[reply_partition].first_marker = 0  # what it wrote before its marker is its own

    def meet(self, request: Accepted) -> bool:
        if request.request_id not in self._known and self.is_new(request):
            self._known.add(request.request_id)
            self._claimed.add(request.request_id)
            self._claims.append(Claim(request, Standing([Choice() for _ in range(request.num_choices)], is_new=True)))
            return True
        return super().meet(replace(request, start=Place(request.start.offset, 0)))

    def is_new(self, request: Accepted) -> bool:
        raise NotImplementedError


class AlwaysFresh(Naive):
    """Starts again whatever comes."""

    def take_markers(self) -> list[int]:
        return []

    def is_new(self, request: Accepted) -> bool:
        return True


class TrustsItsMarker(Naive):
    """Knows no epochs of starts: what starts behind its marker is new, all else is scanned from epoch 0."""

    def is_new(self, request: Accepted) -> bool:
        marker = self._lanes[request.reply_partition].marker
        return marker is not None and marker < request.start.offset


class MarksWhatWasBegun(Naive):
    """Takes what the log holds nothing of as new, without a marker."""

    def is_new(self, request: Accepted) -> bool:
        records = self.world.logs[request.reply_partition][request.start.offset :]
        return all(entry.request_id != request.request_id for batch in records for entry in batch.entries)


class LastMarkerWins(Tenure):
    """Its epochs are the numbers of attempts, which nobody compares."""

    world: World

    def meet(self, request: Accepted) -> bool:
        if request.request_id in self._known:
            return False
        self._known.add(request.request_id)
        self._lanes[request.reply_partition].waiting[request.request_id] = request
        return True

    def scanned(self, scan: Scan) -> None:
        lane = self._lanes[scan.reply_partition]
        lane.is_scanning = False
        for request in [each for each in lane.waiting.values() if scan.covers(each)]:
            del lane.waiting[request.request_id]
            stream = self.world.stream(request, until=scan.marker + 1)
            choices = [Choice(list(each.text), each.prefix, each.ended) for each in stream.choices]
            self._claimed.add(request.request_id)
            self._claims.append(Claim(request, Standing(choices)))


TENURES: dict[Variant, type[Tenure]] = {
    Variant.INDEX_ONLY: AlwaysFresh,
    Variant.START_WITHOUT_EPOCH: TrustsItsMarker,
    Variant.FRESH_UNMARKED: MarksWhatWasBegun,
    Variant.LAST_MARKER: LastMarkerWins,
}


@dataclass
class Work:
    """A request that an engine computes."""

    tenure: Tenure
    request: Accepted
    choices: list[Choice]
    unacked_ends: int = 0
    is_exhausted: bool = False
    is_begun: bool = False
    begun_at: list[int] = field(default_factory=list)
    """For each choice how many tokens it had."""

    @property
    def num_own(self) -> int:
        """Tokens of the first choice that this owner added."""
        return self.choices[0].prefix.count - self.begun_at[0]

    @property
    def is_told(self) -> bool:
        return all(choice.has_ended for choice in self.choices)


class Engine:
    """One engine process."""

    def __init__(self, world: World, incarnation: int) -> None:
        self.world = world
        self.incarnation = incarnation
        self.member_id = ""
        self.is_dead = False
        self.is_frozen = False
        self.attention = world.rng.choice([0.2, 1, 1, 2])
        """How soon it hears of a rebalance."""
        self.view = NOTHING_OWNED
        self.tenures: dict[int, Tenure] = {}
        self.next: dict[int, int] = {}
        """What is read next of each source partition."""
        self.work: dict[str, Work] = {}
        self.wires: list[deque[Batch]] = [deque() for _ in world.logs]
        """For each reply partition what was sent and is not acked, in order."""
        self.acks: deque[tuple[int, int, Batch]] = deque()
        """(reply partition, offset, record), not heard yet."""
        self.marking: dict[int, Tenure] = {}
        """Whose each marker is that is on its way."""
        self.announced: dict[int, Work] = {}
        """What each announcement is about that is on its way."""
        self.begun: set[tuple[str, int]] = set()
        """The requests that it announced, and under which epochs."""
        self.trials: Trials[Work] = Trials(lambda work: work.request.request_id)

    # What it does when it is its turn.

    def learn(self) -> None:
        """Takes part in the group: meets the newest rebalance, joins anew where it was thrown out."""
        group = self.world.group
        if self.member_id not in group.members:
            if self.incarnation < group.incarnation and self.world.variant is not Variant.JOINS_OUTDATED:
                return  # the group's name holds the incarnation: its group is gone
            group.join(self)
        now = group.ownership(self)
        if now.generation == self.view.generation and now.member_id == self.view.member_id:
            return
        kept = now.kept_since(self.view)
        if self.world.variant is Variant.KEEPS_BLINDLY:
            kept = now.partitions & self.view.partitions
        self.view = now
        for partition in [each for each in self.tenures if TopicPartition("requests", each) not in kept]:
            self._lose(partition)
        for _, partition in sorted(now.partitions):
            self._gain(partition)

    def hear(self) -> None:
        """Hears an ack."""
        if not self.acks:
            return
        reply_partition, offset, batch = self.acks.popleft()
        if (begun := self.announced.pop(id(batch), None)) is not None:
            begun.is_begun = True
        if not batch.entries:
            tenure = self.marking.pop(id(batch))
            if self.world.variant is not Variant.EMITS_EARLY:
                tenure.marked(reply_partition, offset)
                self._begin(tenure)
        for entry in batch.entries:
            work = self.work.get(entry.request_id)
            if work is not None and work.tenure.epoch == batch.epoch:
                self._hear_of(work, entry)
        self._go_on_with_suspects()

    def _hear_of(self, work: Work, entry: Entry) -> None:
        """The log has an entry."""
        work.unacked_ends -= entry.end is not End.OPEN
        is_done = work.is_told and work.unacked_ends <= 0
        if is_done or entry.first_index + len(entry.token_ids) - work.begun_at[entry.choice] >= PROOF:
            self.trials.over(work)

    def mark(self) -> None:
        """Writes the markers that are due."""
        for tenure in self.tenures.values():
            for reply_partition in tenure.take_markers():
                self.world.events["markers for gateways that know no epoch"] += (
                    tenure._lanes[reply_partition].marker is not None
                )
                marker = tenure.marker
                self.marking[id(marker)] = tenure
                self.wires[reply_partition].append(marker)
                if self.world.variant is Variant.EMITS_EARLY:
                    tenure.marked(reply_partition, len(self.world.logs[reply_partition]))

    def scan(self) -> None:
        """Makes the scans that are due. That a scan takes time makes no difference: nothing before a marker changes."""
        for tenure in self.tenures.values():
            for scan in tenure.take_scans():
                log = self.world.logs[scan.reply_partition]
                for offset in range(scan.start, min(scan.marker + 1, len(log))):
                    scan.feed(offset, log[offset])
                if self.world.variant is Variant.EMITS_EARLY:
                    scan.feed(scan.marker, None)
                was_over = tenure.is_over
                tenure.scanned(scan)
                self.world.events["scans"] += 1
                self.world.events["tenures given up: a higher epoch"] += tenure.is_over and not was_over
                self._begin(tenure)

    def fetch(self) -> None:
        """Reads the next request of each partition that it believes to own."""
        for partition, tenure in self.tenures.items():
            topic = self.world.topics[partition]
            if self.next[partition] == len(topic):
                continue
            request = topic[self.next[partition]]
            self.next[partition] += 1
            if request.request_id in self.world.committed:
                continue
            if not tenure.meet(request):
                self.world.events["deliveries of what runs here already"] += 1
            if tenure.epoch != self.world.group.epoch_of(partition):
                self.world.events["requests fetched by zombies"] += 1
            self._begin(tenure)

    def compute(self) -> None:
        """A step: some tokens for some of its choices, a record for each pair of partitions."""
        told: dict[tuple[int, Source, int], list[Entry]] = {}
        works = [work for work in self.work.values() if work.is_begun]
        if deadly := [work for work in works if self.world.is_deadly(work)]:
            self.world.poisoned(self, deadly[0].request)
            return
        for work in works:
            if work.tenure.may_emit(work.request.request_id):
                record = told.setdefault((work.request.reply_partition, work.tenure.source, work.tenure.epoch), [])
                record += [entry for index in range(len(work.choices)) for entry in self._step(work, index)]
        for (reply_partition, source, epoch), entries in told.items():
            if entries:
                self.wires[reply_partition].append(Batch(source, epoch, entries))

    def commit(self) -> None:
        """Commits what is answered, where the group lets it, and forgets it then."""
        for request_id, work in list(self.work.items()):
            if not work.is_told or work.unacked_ends > 0 or work.tenure.is_over:
                continue
            partition = work.tenure.source.partition
            if self.world.group.confirms(self, partition):
                self.world.committed.add(request_id)
                work.tenure.forget(request_id)
                del self.work[request_id]

    def _gain(self, partition: int) -> None:
        """The position falls back to what is committed, also where the partition stayed."""
        self.next[partition] = 0
        if partition in self.tenures:
            self.world.events["partitions kept through a rebalance"] += 1
            return
        source, replies = Source(1, partition), range(len(self.world.logs))
        epoch = self.world.new_attempt() if self.world.variant is Variant.LAST_MARKER else self.view.epoch
        tenure = TENURES.get(self.world.variant, Tenure)(source, epoch, replies)
        if isinstance(tenure, (Naive, LastMarkerWins)):
            tenure.world = self.world
        self.tenures[partition] = tenure
        self.world.events["partitions gained"] += 1

    def _lose(self, partition: int) -> None:
        tenure = self.tenures.pop(partition)
        tenure.end()
        for work in self.work.values():
            if work.tenure is tenure:
                self.trials.over(work)
                self._let_go(work)
        self.work = {key: work for key, work in self.work.items() if work.tenure is not tenure}
        self._go_on_with_suspects()

    def _begin(self, tenure: Tenure) -> None:
        for claim in tenure.take_claims():
            self.world.check_claim(tenure, claim)
            self.world.note_claim(tenure, claim)
            standing = claim.standing
            if standing.contradiction:
                raise Fault(f"refused: by a scan, {standing.contradiction}")
            self.world.recount(tenure, claim)
            if standing.is_exhausted:
                self.world.exhausted(tenure, claim)
            work = Work(tenure, claim.request, standing.choices, is_exhausted=standing.is_exhausted)
            work.begun_at = [choice.prefix.count for choice in work.choices]
            work.is_begun = standing.is_exhausted or standing.has_ended
            self.work[claim.request.request_id] = work
            if not work.is_begun:
                self._start(work, standing)
        self._go_on_with_suspects()

    def _start(self, work: Work, standing: Standing) -> None:
        """What `services.engine.starts` does."""
        if standing.is_suspect and self.world.variant is not Variant.SUSPECTS_TOGETHER:
            self.trials.add(work)
            return
        self._announce(work)
        work.is_begun = standing.is_new or self.world.variant is Variant.BEGINS_UNANNOUNCED

    def _go_on_with_suspects(self) -> None:
        if (on_trial := self.trials.on_trial) is not None and on_trial.tenure.is_over:
            self.trials.over(on_trial)
        if (work := self.trials.next()) is not None:
            self._announce(work)
            work.is_begun = self.world.variant is Variant.BEGINS_UNANNOUNCED

    def _let_go(self, work: Work) -> None:
        """An entry that says that it lives, though the partition is another's."""
        request = work.request
        if (request.request_id, work.tenure.epoch) in self.begun and self.world.variant is not Variant.LEAVES_SILENTLY:
            entry = Entry(request.request_id, 0, 0, [], 0, lets_go=True)
            self.wires[request.reply_partition].append(Batch(work.tenure.source, work.tenure.epoch, [entry]))

    def has_let_go(self, request: Accepted, epoch: int) -> bool:
        """Whether it lives, has begun a request, lost it, and has nothing on its way that says so."""
        if self.is_dead or (request.request_id, epoch) not in self.begun:
            return False
        has_lost = all(tenure.epoch != epoch for tenure in self.tenures.values())
        wire = self.wires[request.reply_partition]
        return has_lost and not any(
            entry.lets_go and entry.request_id == request.request_id and batch.epoch == epoch
            for batch in wire
            for entry in batch.entries
        )

    def _announce(self, work: Work) -> None:
        """An entry without tokens: the request is begun."""
        index = next(index for index, choice in enumerate(work.choices) if not choice.has_ended)
        prefix = work.choices[index].prefix
        entry = Entry(work.request.request_id, index, prefix.count, [], prefix.hash)
        batch = Batch(work.tenure.source, work.tenure.epoch, [entry])
        self.announced[id(batch)] = work
        self.begun.add((work.request.request_id, work.tenure.epoch))
        self.wires[work.request.reply_partition].append(batch)

    def _step(self, work: Work, index: int) -> Iterator[Entry]:
        world, choice, request_id = self.world, work.choices[index], work.request.request_id
        if choice.has_ended or (not world.is_calm and world.rng.random() < 0.3):
            return
        before = choice.prefix
        if work.is_exhausted or request_id in world.cancelled and world.rng.random() < 0.7:
            tokens, end = world.write(choice.token_ids, world.rng.randint(0, 1)), End.OUTRIGHT
        else:
            room = world.length - before.count
            most = 1 if request_id in world.poison else world.rng.choice([1, 1, 1, 2, 3])
            tokens = world.write(choice.token_ids, min(room, most))
            last = before.count + len(tokens) == world.length or world.rng.random() < 0.05
            end = End.BY_TOKENS if last else End.OPEN
        choice.token_ids += tokens
        choice.prefix = before.extended(tokens)
        if end is not End.OPEN:
            choice.has_ended = True
            work.unacked_ends += 1
            world.events[f"choices ended {end.value}"] += 1
        yield Entry(request_id, index, before.count, tokens, before.hash, end)


class Group:
    """The consumer group, at its coordinator."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.incarnation = 0
        self.generation = 0
        self.members: dict[str, Engine] = {}
        self.owners: dict[int, str] = {}
        self.gained: dict[int, int] = {}
        """The epoch in which the owner of each partition gained it."""

    def join(self, engine: Engine) -> None:
        engine.member_id = f"member-{self.world.new_attempt()}"
        self.members[engine.member_id] = engine
        self.rebalance()

    def throw_out(self, member_id: str) -> None:
        del self.members[member_id]
        self.rebalance()

    def rebalance(self) -> None:
        """Moves partitions, some of them without need."""
        self.generation += 1
        if not self.members:
            self.owners.clear()
            return
        for partition in range(len(self.world.topics)):
            before = self.owners.get(partition)
            stays = before in self.members and (self.world.is_only_poisoned or self.world.rng.random() < 0.6)
            after = before if stays and before else self.world.rng.choice(list(self.members))
            if after != before:
                self.owners[partition] = after
                self.gained[partition] = (self.incarnation << 32) + self.generation
                self.world.events["changes of owner"] += 1

    def ownership(self, engine: Engine) -> Ownership:
        mine = [partition for partition, member in self.owners.items() if member == engine.member_id]
        partitions = frozenset(TopicPartition("requests", each) for each in mine)
        return Ownership(partitions, self.generation, engine.member_id, engine.incarnation)

    def confirms(self, engine: Engine, partition: int) -> bool:
        """Whether a commit is taken."""
        is_current = engine.view.generation == self.generation and engine.member_id in self.members
        return is_current and self.owners.get(partition) == engine.member_id

    def epoch_of(self, partition: int) -> int:
        return self.gained.get(partition, 0)

    def make_anew(self) -> None:
        """The group is deleted: nobody is a member any more, and generations start again."""
        self.members.clear()
        self.owners.clear()
        self.generation = 0
        if self.world.variant is not Variant.SAME_INCARNATION:
            self.incarnation += 1


# The world.


@dataclass(frozen=True)
class Poison:
    """What a request has that ends engines."""

    index: int
    """With so many tokens it cannot be computed on."""
    most_own: int
    """An engine that has added so many tokens to it dies of the next."""


def _got_on(choice: Followed) -> int:
    """The offset behind the last record with which an owner got on, as a reader sees it; 0 where there is none."""
    behind, first = 0, dict[int, int]()
    count = choice.first_count
    for offset, epoch, after, _ in choice.records:
        first.setdefault(epoch, count)
        if after - first[epoch] >= PROOF:
            behind = offset + 1
        count = after
    return behind


class World:
    """One run."""

    def __init__(self, rng: random.Random, variant: Variant = Variant.OURS) -> None:
        self.rng = rng
        self.variant = variant
        self.events: Counter[str] = Counter()
        self.length = rng.randint(2, 12)
        """Most tokens of a choice."""
        self.is_calm = False
        """Faults have ceased."""
        self.logs: list[list[Batch]] = [[] for _ in range(rng.choice([1, 1, 2]))]
        self.topics: list[list[Accepted]] = [[] for _ in range(rng.choice([1, 1, 2, 3]))]
        self.committed: set[str] = set()
        self.cancelled: set[str] = set()
        self.is_only_poisoned = rng.random() < 0.15
        """Nothing goes wrong but for one poison request."""
        self.poison_rate = rng.choice([0, 0, 0.1, 0.3])
        self.poison: dict[str, Poison] = {}
        self.deaths: Counter[str] = Counter()
        """Of each poison request, since faults ceased."""
        self.parents: dict[int, int] = {}
        self.source_of: dict[str, Source] = {}
        self.requests: list[Accepted] = []
        self.unpublished: list[Accepted] = []
        self.cursors: list[tuple[Accepted, Cursor]] = []
        self.num_attempts = 0
        self.group = Group(self)
        self.gateways = [Reader(self, each, 0, {}) for each in range(len(self.logs))]
        self.engines = [Engine(self, 0) for _ in range(rng.randint(1, 3))]
        self.num_acts = rng.randint(30, 250)
        self.max_requests = rng.randint(1, 8)

    def run(self) -> Counter[str]:
        """Everything that happens, and the checks. Returns how often what happened.

        Raises:
            Fault: a promise was broken.
        """
        acts = self._acts()
        names, weights = list(acts), [weight for _, weight in acts.values()]
        for name in self.rng.choices(names, weights, k=self.num_acts):
            acts[name][0]()
        self._calm_down()
        self.check()
        return self.events

    # What engines and readers ask.

    def new_attempt(self) -> int:
        self.num_attempts += 1
        return self.num_attempts

    def write(self, known: list[int], count: int) -> list[int]:
        """New tokens after those that their writer knows."""
        tokens = []
        before = known[-1] if known else 0
        for _ in range(count):
            token = len(self.parents) + 1
            self.parents[token] = before
            tokens.append(token)
            before = token
        return tokens

    def stream(self, request: Accepted, *, until: int | None = None, cursor: Cursor | None = None) -> Stream:
        """What somebody has who reads a request from its start, or from a cursor."""
        place = request.start if cursor is None else cursor.place
        reader = self.reader(request, place)
        reader.streams[request.request_id] = Stream(self, request, cursor)
        return reader.read(until).streams[request.request_id]

    def reader(self, request: Accepted, place: Place) -> Reader:
        met = {self.source_of[request.request_id]: place.epoch} if place.epoch else {}
        return Reader(self, request.reply_partition, place.offset, met)

    def check_claim(self, tenure: Tenure, claim: Claim) -> None:
        """What a new owner starts from is what everybody accepted who has read up to its marker."""
        if self.variant is not Variant.OURS:
            return
        until = self._committed_until(tenure, claim.request)
        accepted = self.stream(claim.request, until=until).state
        if [(each.token_ids, each.has_ended) for each in claim.standing.choices] != accepted:
            raise Fault("a scan has another text than readers")

    def recount(self, tenure: Tenure, claim: Claim) -> None:
        """Two wrong protocols count otherwise what was begun in vain."""
        if self.variant not in (Variant.COUNTS_OWNERS, Variant.ONE_TOKEN_IS_PROOF) or claim.standing.is_new:
            return
        epochs, vain = Epochs({tenure.source: claim.request.start.epoch}), claim.standing.vain
        vain.clear()
        alive: set[int] = set()
        for batch in self.logs[claim.request.reply_partition][claim.request.start.offset : self._until(tenure, claim)]:
            if batch.source != tenure.source:
                continue
            is_admitted = epochs.admit(batch.source, batch.epoch)
            for entry in [each for each in batch.entries if each.request_id == claim.request.request_id]:
                vain.add(batch.epoch)
                if entry.token_ids or entry.lets_go:
                    alive.add(batch.epoch)
                if is_admitted and entry.token_ids and self.variant is Variant.ONE_TOKEN_IS_PROOF:
                    vain.clear()
        if self.variant is Variant.ONE_TOKEN_IS_PROOF:
            vain.difference_update(alive)

    def is_deadly(self, work: Work) -> bool:
        """Whether whoever computes the next step of it dies."""
        poison = self.poison.get(work.request.request_id)
        if poison is None or work.is_exhausted or work.is_told or not work.tenure.may_emit(work.request.request_id):
            return False
        return work.choices[0].prefix.count >= poison.index or work.num_own >= poison.most_own

    def poisoned(self, engine: Engine, request: Accepted) -> None:
        """An engine dies of a request."""
        self._kill(engine)
        self.events["engines that a poison request ended"] += 1
        self.deaths[request.request_id] += self.is_calm
        poison = self.poison[request.request_id]
        # The first may be on nobody's count, and each token that is left makes the next start another one.
        if self.deaths[request.request_id] > MAX_STARTS + 1 + min(poison.index, self.length) * (poison.most_own > 1):
            raise Fault("poison: it ends one engine after the other")

    def note_claim(self, tenure: Tenure, claim: Claim) -> None:
        if any(choice.token_ids for choice in claim.standing.choices):
            marker = tenure._lanes[claim.request.reply_partition].first_marker
            kind = (
                "in mid-text" if claim.request.start.offset <= marker else "from a zombie that wrote behind the marker"
            )
            self.events[f"requests taken over {kind}"] += 1

    def _committed_until(self, tenure: Tenure, request: Accepted) -> int:
        """Up to where everything is committed that is, when a tenure claims a request."""
        if request.start.epoch < tenure.epoch:
            scanned = tenure._lanes[request.reply_partition].scanned
            assert scanned is not None
            return scanned + 1
        log = self.logs[request.reply_partition]
        later = (n for n, each in enumerate(log) if each.source == tenure.source and each.epoch > tenure.epoch)
        return next(later, len(log))

    def exhausted(self, tenure: Tenure, claim: Claim) -> None:
        """A request was begun too often."""
        request_id = claim.request.request_id
        until = self._until(tenure, claim)
        got_on = max(map(_got_on, self.stream(claim.request, until=until).choices))
        log = self.logs[claim.request.reply_partition][:until]
        wrote = {
            batch.epoch
            for batch in log[max(got_on, claim.request.start.offset) :]
            for entry in batch.entries
            if entry.request_id == request_id
        }
        if len(wrote) < MAX_STARTS:
            raise Fault("given up: a request that fewer than three epochs began since it got on")
        said = {
            batch.epoch
            for batch in self.logs[claim.request.reply_partition][until:]
            for entry in batch.entries
            if entry.request_id == request_id and entry.lets_go
        }
        if any(each.has_let_go(claim.request, epoch) for each in self.engines for epoch in claim.standing.vain - said):
            raise Fault("given up: a request that an owner let go which lives")
        if self.is_only_poisoned and request_id not in self.poison:
            raise Fault("given up: an innocent, where nothing went wrong but for one poison request")
        self.cancelled.add(request_id)
        self.events["requests given up"] += 1
        self.events["poison requests given up"] += request_id in self.poison

    def _until(self, tenure: Tenure, claim: Claim) -> int:
        """Up to where the log counts for a claim that was scanned."""
        scanned = tenure._lanes[claim.request.reply_partition].scanned
        end = len(self.logs[claim.request.reply_partition])
        return end if scanned is None else min(end, scanned + 1)

    # What happens.

    def _acts(self) -> dict[str, tuple[Callable[[], None], float]]:
        """What may happen in this run, and how often."""
        rng = self.rng
        usual: dict[str, tuple[Callable[[], None], float]] = {
            "publish": (self._publish, 2),
            "arrive": (self._arrive, 2),
            "gateway reads": (self._read, 3),
            "engine": (self._engine_acts, 22),
            "land": (self._land, 9),
            "turn": (self._whole_turn, 6),
        }
        faults: dict[str, tuple[Callable[[], None], float]] = {
            "crash": (self._crash, 0.5),
            "freeze": (self._freeze, 1.5),
            "wake": (self._wake, 1),
            "throw out": (self._throw_out, 1.5),
            "usurp": (self._usurp, 0.8),
            "rebalance": (self.group.rebalance, 0.5),
            "new engine": (self._new_engine, 0.7),
            "fail": (self._fail, 0.7),
            "make anew": (self._make_anew, 0.4),
            "restart gateway": (self._restart_gateway, 0.6),
            "cancel": (self._cancel, 0.5),
            "cursor": (self._note_cursor, 1.5),
        }
        if self.is_only_poisoned:
            return usual | {"replace": (self._replace_dead, 3)}
        has_all = rng.random() < 0.5
        chosen = {
            name: (act, weight * rng.choice([0.3, 1, 3]))
            for name, (act, weight) in faults.items()
            if has_all or rng.random() < 0.5
        }
        return usual | chosen

    def _live(self) -> list[Engine]:
        return [each for each in self.engines if not each.is_dead]

    def _awake(self) -> list[Engine]:
        return [each for each in self._live() if not each.is_frozen]

    def _publish(self) -> None:
        """A gateway notes where it stands, and sends a request on its way."""
        if len(self.requests) == self.max_requests:
            return
        gateway = self.rng.choice(self.gateways)
        request_id = f"r{len(self.requests)}"
        source = self.source_of[request_id] = Source(1, self.rng.randrange(len(self.topics)))
        start = Place(gateway.position, gateway.highest(source))
        reply_partition = self.gateways.index(gateway)
        request = Accepted(request_id, reply_partition, start, self.rng.choice([1, 1, 2, 3]))
        if self.rng.random() < self.poison_rate and not (self.is_only_poisoned and self.poison):
            request = replace(request, num_choices=1)
            self.poison[request_id] = self._poison()
        self.events["requests"] += 1
        self.events["requests of gateways that know no epoch"] += start.epoch == 0
        self.requests.append(request)
        self.unpublished.append(request)
        gateway.streams[request_id] = Stream(self, request)

    def _poison(self) -> Poison:
        never = self.length + 1
        if self.is_only_poisoned:
            return self.rng.choice([Poison(0, never), Poison(never, 1)])
        return self.rng.choice([Poison(0, never), Poison(self.rng.randint(1, self.length), never), Poison(never, 1)])

    def _arrive(self) -> None:
        """The log takes a request that was on its way."""
        if self.unpublished:
            request = self.unpublished.pop(self.rng.randrange(len(self.unpublished)))
            self.topics[self.source_of[request.request_id].partition].append(request)

    def _read(self) -> None:
        gateway = self.rng.choice(self.gateways)
        gateway.read(min(len(gateway.log), gateway.position + self.rng.choice([1, 2, 5, 20])))

    def _engine_acts(self) -> None:
        if awake := self._awake():
            engine = self.rng.choice(awake)
            acts = [engine.learn, engine.hear, engine.mark, engine.scan, engine.fetch, engine.compute, engine.commit]
            self.rng.choices(acts, [engine.attention, 3, 2, 3, 3, 4, 1])[0]()

    def _whole_turn(self) -> None:
        """A healthy engine at work: what the random order of acts reaches too seldom."""
        if awake := self._awake():
            engine = self.rng.choice(awake)
            self._work(engine, learns=self.rng.random() < 0.3 * engine.attention)

    def _work(self, engine: Engine, *, learns: bool) -> None:
        if engine.is_dead:
            return
        if learns:
            engine.learn()
        for act in (engine.mark, engine.fetch, engine.scan, engine.compute):
            act()
        for reply_partition in range(len(self.logs)):
            self._land_first(engine, reply_partition)
            if not engine.is_dead:
                engine.hear()

    def _usurp(self) -> None:
        """An owner is thrown out and hears nothing of it, while another takes over: two are at work, and gateways and
        clients about their business."""
        before = [engine for name, engine in self.group.members.items() if engine.tenures and not engine.is_dead]
        if not before:
            return
        old = self.rng.choice(before)
        old.is_frozen = False
        self.group.throw_out(old.member_id)
        others = [each for each in self._awake() if each is not old]
        new = self.rng.choice(others) if others else Engine(self, self.group.incarnation)
        if not others:
            self.engines.append(new)
        self.events["owners that work on beside another"] += 1
        for turn in range(self.rng.randint(4, 16)):
            self._work(new, learns=turn == 0 or self.rng.random() < 0.1)
            if self.rng.random() < 0.6:
                self._work(old, learns=False)
            for act, chance in (
                (self._restart_gateway, 0.1),
                (self._publish, 0.3),
                (self._arrive, 0.4),
                (self._read, 0.4),
            ):
                if self.rng.random() < chance:
                    act()

    def _land(self) -> None:
        """The log takes the oldest record that an engine, dead or alive, has on its way to a partition."""
        wires = [(engine, number) for engine in self.engines for number, wire in enumerate(engine.wires) if wire]
        if wires:
            self._land_first(*self.rng.choice(wires))

    def _land_first(self, engine: Engine, reply_partition: int) -> None:
        if not engine.wires[reply_partition]:
            return
        batch = engine.wires[reply_partition].popleft()
        engine.acks.append((reply_partition, self._append(reply_partition, batch), batch))

    def _append(self, reply_partition: int, batch: Batch) -> int:
        log = self.logs[reply_partition]
        newest = max((each.epoch for each in log if each.source == batch.source), default=0)
        kind = "tokens" if batch.entries else "markers"
        self.events[f"{kind} that land behind a later owner's marker"] += batch.epoch < newest
        log.append(batch)
        return len(log) - 1

    def _fail(self) -> None:
        """A send fails: some records are in the log all the same, and all are sent again."""
        wires = [(number, wire) for engine in self._live() for number, wire in enumerate(engine.wires) if wire]
        if wires:
            number, wire = self.rng.choice(wires)
            for batch in list(wire)[: self.rng.randint(0, len(wire))]:
                self._append(number, batch)
                self.events["records that are sent again though the log has them"] += 1

    def _crash(self) -> None:
        if live := self._live():
            self._kill(self.rng.choice(live))
            self.events["crashes"] += 1

    def _kill(self, engine: Engine) -> None:
        engine.is_dead = True
        for wire in engine.wires:
            for _ in range(self.rng.randint(0, len(wire))):
                wire.pop()

    def _replace_dead(self) -> None:
        """The group throws out who is dead, and where nobody lives somebody starts."""
        for member_id in [name for name, engine in self.group.members.items() if engine.is_dead]:
            self.group.throw_out(member_id)
        if not self._live():
            self.engines.append(Engine(self, self.group.incarnation))

    def _freeze(self) -> None:
        if awake := self._awake():
            self.rng.choice(awake).is_frozen = True
            self.events["freezes"] += 1

    def _wake(self) -> None:
        if frozen := [each for each in self._live() if each.is_frozen]:
            self.rng.choice(frozen).is_frozen = False

    def _throw_out(self) -> None:
        """A session times out: mostly that of a member which does not answer."""
        silent = [name for name, engine in self.group.members.items() if engine.is_dead or engine.is_frozen]
        candidates = silent or list(self.group.members)
        if candidates and (silent or self.rng.random() < 0.3):
            self.group.throw_out(self.rng.choice(candidates))

    def _new_engine(self) -> None:
        if len(self._live()) < 4:
            self.engines.append(Engine(self, self.group.incarnation))

    def _make_anew(self) -> None:
        """Those that run freeze (to wake up later) or are gone; whoever starts now has the incarnation of now."""
        self.group.make_anew()
        for engine in self._live():
            engine.is_frozen, engine.is_dead = True, self.rng.random() < 0.4
        self.engines += [Engine(self, self.group.incarnation) for _ in range(self.rng.randint(1, 2))]
        self.events["groups made anew"] += 1

    def _restart_gateway(self) -> None:
        """Its clients come back with their cursors; it reads from the log's end and knows nothing."""
        index = self.rng.randrange(len(self.gateways))
        gateway = self.gateways[index]
        for stream in gateway.streams.values():
            self.cursors.append((stream.request, stream.cursor(gateway)))
        self.gateways[index] = Reader(self, index, len(gateway.log), {})
        self.events["gateways that start again"] += 1

    def _cancel(self) -> None:
        if self.requests:
            self.cancelled.add(self.rng.choice(self.requests).request_id)

    def _note_cursor(self) -> None:
        gateway = self.rng.choice(self.gateways)
        if gateway.streams:
            stream = self.rng.choice(list(gateway.streams.values()))
            self.cursors.append((stream.request, stream.cursor(gateway)))

    # The end.

    def _calm_down(self) -> None:
        """Faults cease. Some zombies act once more before they hear of it; then whoever lives comes to an end."""
        self.unpublished.sort(key=lambda _: self.rng.random())
        while self.unpublished:
            self._arrive()
        for engine in self._live():
            engine.is_dead = engine.is_frozen and self.rng.random() < 0.3
            engine.is_frozen = False
        for _ in range(self.rng.randint(0, 12)):
            self.rng.choice([self._engine_acts, self._land])()
        self._replace_dead()
        for engine in self._live():
            if engine.incarnation < self.group.incarnation and self.variant is not Variant.JOINS_OUTDATED:
                engine.is_dead = True  # whoever raises the incarnation starts engines again with it
                if engine.member_id in self.group.members:
                    self.group.throw_out(engine.member_id)
        self.is_calm = True
        for _ in range(300):
            self._replace_dead()
            if all(self.stream(request).has_ended for request in self.requests):
                return
            for engine in self.rng.sample(self.engines, len(self.engines)):
                self._go_on(engine)
        raise Fault("stuck: faults have ceased, an owner lives, and a stream has no end")

    def _go_on(self, engine: Engine) -> None:
        if not engine.is_dead:
            engine.learn()
            for act in (engine.mark, engine.fetch, engine.fetch, engine.scan, engine.commit, engine.compute):
                act()
        for reply_partition in range(len(self.logs)):
            while engine.wires[reply_partition]:
                self._land_first(engine, reply_partition)
        while engine.acks and not engine.is_dead:
            engine.hear()

    def check(self) -> None:
        """Every reader has the same text of every choice, and its end."""
        texts = {request.request_id: self.stream(request).state for request in self.requests}
        for gateway in self.gateways:
            gateway.read()
            for request_id, stream in gateway.streams.items():
                if stream.state != texts[request_id]:
                    raise Fault("incoherent: a live reader has another text")
        for request, cursor in self.cursors:
            self._check_cursor(request, cursor, texts[request.request_id])

    def _check_cursor(self, request: Accepted, cursor: Cursor, text: list[tuple[list[int], bool]]) -> None:
        """A client that comes back with it, and maybe again with one that it gets on its way, has the same."""
        self.events["readers that begin in mid-log"] += 1
        reader = self.reader(request, cursor.place)
        stream = reader.streams[request.request_id] = Stream(self, request, cursor)
        reader.read(self.rng.randint(min(reader.position, len(reader.log)), len(reader.log)))
        again = self.stream(request, cursor=stream.cursor(reader))
        reader.read()
        for each in (stream, again):
            if not each.has_ended:
                raise Fault("stuck: whoever comes back with a cursor waits for an end that lies before it")
            if each.state != text:
                raise Fault("incoherent: whoever comes back with a cursor has another text")


@dataclass
class Result:
    """What many runs of one variant gave."""

    num_runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """In how many runs which kind of promise was broken first."""
    first: dict[str, int] = field(default_factory=dict)
    """The first seed that showed each."""
    events: Counter[str] = field(default_factory=Counter)
    runs_with: Counter[str] = field(default_factory=Counter)
    """In how many runs an event happened."""

    @property
    def num_faults(self) -> int:
        return self.faults.total()


def run_many(variant: Variant, seeds: Iterable[int], *, until_found: bool = False) -> Result:
    """Runs a variant once for each seed, or until it has shown a fault."""
    result = Result()
    for seed in seeds:
        world = World(random.Random(seed), variant)
        result.num_runs += 1
        try:
            world.run()
        except Fault as fault:
            kind = str(fault).partition(":")[0]
            result.faults[kind] += 1
            result.first.setdefault(kind, seed)
            if until_found:
                break
        result.events += world.events
        result.runs_with.update(name for name, count in world.events.items() if count)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the model of the log's protocol.")
    parser.add_argument("--runs", type=int, default=100_000, help="of our protocol; default: %(default)s")
    parser.add_argument("--variant-runs", type=int, default=5_000, help="of each wrong one; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the first run, the others follow; default: %(default)s")
    options = parser.parse_args()
    started = time.monotonic()
    ours = run_many(Variant.OURS, range(options.seed, options.seed + options.runs))
    print(f"{ours.num_runs:,} runs from seed {options.seed}: {ours.num_faults} faults {ours.first or ''}")
    for name, count in sorted(ours.events.items()):
        share = ours.runs_with[name] / ours.num_runs
        print(f"  {count:>11,} {name}, in {share:.1%} of runs")
    blind = []
    for variant in [each for each in Variant if each is not Variant.OURS]:
        found = run_many(variant, range(options.seed, options.seed + options.variant_runs))
        kinds = ", ".join(f"{kind} {count / found.num_runs:.2%}" for kind, count in found.faults.most_common())
        print(f"{variant.value}\n  {kinds or 'NO FAULT FOUND: the model is blind'}")
        blind += [variant.name] if not found.num_faults else []
    print(f"{time.monotonic() - started:.0f} s")
    if ours.num_faults or blind:
        sys.exit(1)


if __name__ == "__main__":
    main()
