"""What the engine holds of each request, from the record that brought it to the ack of its last token.

A choice goes through three states here: **open** (it may hold a slot), **told** (its last token is on its way to the
log) and **settled** (the log has it). A request whose choices are all settled is done: its offset may be committed, and
it is forgotten.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from holdfast import ids
from holdfast.accept import Prefix
from holdfast.bus import Headers, TopicPartition
from holdfast.ownership import PROOF
from services.engine.commits import Commits
from services.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Request:
    """One request that was taken from the log."""

    request_id: str
    source: TopicPartition
    offset: int
    timestamp_ms: int
    """When the log took it."""
    headers: Headers
    """Of its record: they carry the trace."""
    reply_partition: int
    interactive: bool
    num_choices: int
    sequences: tuple[Sequence, ...] = ()
    """One for each choice; none where the request was refused."""
    accepted_at: int | None = None
    """When its gateway admitted it, in nanoseconds since the epoch: what tells it from another one of its id."""
    has_begun: bool = False
    """Whether the scheduler has its sequences: not before it is known what other engines told of it."""

    # `Intake` fills this.
    claim: str = field(init=False)
    """Under which name it is claimed (`takeover`): its id, where no other of that id is held."""

    # `Starts` fills this.
    on_trial: bool = False
    """Whether it was begun in vain before, and it is not known yet that this engine gets on with it."""

    # `Requests` fills these.
    open: set[int] = field(default_factory=set)
    unsettled: set[int] = field(default_factory=set)

    # `emit` fills these.
    prefixes: list[Prefix] = field(default_factory=list)
    """For each choice what its records said so far."""
    begun_at: list[int] = field(default_factory=list)
    """For each choice how many tokens it had when this engine announced that it begins; empty before."""
    epoch: int | None = None
    """That of the announcement."""

    def __post_init__(self) -> None:
        self.open = set(range(len(self.sequences)))
        self.unsettled = set(range(self.num_choices))
        self.claim = self.request_id
        self.prefixes = [Prefix()] * self.num_choices

    def is_proof(self, choice: int, num_tokens: int) -> bool:
        """Whether it is no suspect any more once the log has so many tokens of a choice."""
        return self.on_trial and num_tokens - self.begun_at[choice] >= PROOF


class Requests:
    """All requests that this engine holds. Lives in the event loop.

    At most one **runs** under an id: has choices that are open. Others of that id may be held, such as one that was
    refused because of it.
    """

    def __init__(self, commits: Commits) -> None:
        """`commits` is told of every request whose last token the log has."""
        self._commits = commits
        self._held: set[Request] = set()
        self._running: dict[str, Request] = {}
        self._called: defaultdict[str, set[Request]] = defaultdict(set)
        """Those that run, by what their clients call them."""
        self._num_open = {True: 0, False: 0}
        self.when_fewer: Callable[[], None] = lambda: None
        """Called when a choice is no longer open."""
        self.when_proven: Callable[[Request], None] = lambda request: None
        """Called when the log has what says that a suspect is none."""
        self.when_done: Callable[[Request], None] = lambda request: None
        """Called when a request is done."""
        self._empty = asyncio.Event()
        self._empty.set()

    def running(self, request_id: str) -> Request | None:
        """The request that runs under this id."""
        return self._running.get(request_id)

    def meant(self, request_id: str) -> list[Request]:
        """Those that run and are called so, in the log or by their clients."""
        request = self._running.get(request_id)
        return [request] if request is not None else list(self._called.get(request_id, ()))

    def of(self, sequence: Sequence) -> Request | None:
        """The running request that a sequence answers; None where it was dropped, though it may have come again."""
        request = self._running.get(sequence.request_id)
        return request if request is not None and sequence in request.sequences else None

    def num_open(self, *, interactive: bool) -> int:
        """Choices of one class that may hold a slot."""
        return self._num_open[interactive]

    def add(self, request: Request) -> None:
        self._held.add(request)
        if request.open:
            assert request.request_id not in self._running
            self._running[request.request_id] = request
            self._called[ids.of_client(request.request_id)].add(request)
        self._num_open[request.interactive] += len(request.open)
        self._empty.clear()

    def told(self, request: Request, choice: int) -> None:
        """The choice ended; its last record is on its way."""
        if choice in request.open:
            request.open.remove(choice)
            if not request.open:
                self._runs_no_more(request)
            self._num_open[request.interactive] -= 1
            self.when_fewer()

    def settle(self, request: Request, choice: int) -> None:
        """The log has the choice's last record."""
        request.unsettled.discard(choice)
        if not request.unsettled and request in self._held:
            self._forget([request])
            self._commits.finish(request.source, request.offset)
            self.when_done(request)

    def drop(self, partitions: Collection[TopicPartition]) -> list[Request]:
        """Forgets the requests of these partitions: they are another engine's now. Returns them."""
        dropped = [each for each in self._held if each.source in partitions]
        for request in dropped:
            if request.open:
                self._runs_no_more(request)
            self._num_open[request.interactive] -= len(request.open)
            request.open.clear()
        self._forget(dropped)
        if dropped:
            self.when_fewer()
        return dropped

    async def until_empty(self) -> None:
        """Returns once no request is held."""
        await self._empty.wait()

    def _runs_no_more(self, request: Request) -> None:
        del self._running[request.request_id]
        called = ids.of_client(request.request_id)
        self._called[called].remove(request)
        if not self._called[called]:
            del self._called[called]

    def _forget(self, requests: Collection[Request]) -> None:
        self._held.difference_update(requests)
        if not self._held:
            self._empty.set()
