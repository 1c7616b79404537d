"""One open request as its client sees it: events to take, when they are due, and how it ends."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from holdfast import ids
from holdfast.errors import AlreadyExists, HoldfastError, StreamFailed
from holdfast.events import Finished, FinishReason, Tokens
from services.gateway.choice import Choice, ChoiceEnd, Manner, Mark, Part, Piece
from services.gateway.cursor import Cursor, Cursors


class State(enum.Enum):
    """Where an answer stands; it moves once, away from OPEN."""

    OPEN = "open"
    """More may come from the log."""
    FINISHED = "finished"
    """Every choice has ended; what is left is for the client to take."""
    CLOSED = "closed"
    """The client left before the end."""
    BROKEN = "broken"
    """It cannot go on; `next` raises why."""


class Answer:
    """The answer to one request, from a cursor on.

    Three hands touch it, all in one event loop: what comes from the log (`accept`, `decoded`), the clock (`expire`),
    and the one client that takes events (`next`) until `at_end`. Nothing but `next` waits.

    A client that reads slowly gets more in each event, not more events. Beyond `max_waiting` tokens for each choice the
    answer is **behind**: what more there is waits in the log.
    """

    def __init__(
        self,
        start: Cursor,
        *,
        prompt_tokens: int,
        manner: Manner,
        cursors: Cursors,
        cancel_on_disconnect: bool,
        flush: float,
        max_waiting: int,
        on_end: Callable[[Answer], None],
        on_overflow: Callable[[Answer], None],
        cancel: Callable[[int | None, str], None],
    ) -> None:
        """`cancel_on_disconnect`: the request ends with a client that leaves. `flush`: seconds
        between two events of the middle. `on_end`: called once, when the answer leaves OPEN. `on_overflow`: too much
        waits for the client; whoever is told feeds it no more than it takes, until it has caught up. `cancel`: wishes that a
        choice of the request, or all of it, end, and says why."""
        self.request_id = ids.of_client(start.request_id)
        self.log_id = start.request_id
        self.source = start.source
        self.prompt_tokens = prompt_tokens
        self.state = State.OPEN
        self.error: HoldfastError | None = None
        self.first_token_at: float | None = None
        """Loop time at which the first token was ready to be taken."""
        self.last_token_at: float | None = None
        self.is_behind = False
        """Whether it is fed from the log as its client takes it, and not as the log grows."""
        self._on_end = on_end
        self._on_overflow = on_overflow
        self._cancel = cancel
        self._choices = [
            Choice(index, start=place, num_prompt=prompt_tokens, manner=manner, on_stop=self._stop_string)
            for index, place in enumerate(start.places)
        ]
        self._loop = asyncio.get_running_loop()
        self._flush = flush
        self._max_waiting = max_waiting * len(start.places)
        self._start = start
        self._cursors = cursors
        self._encode_cursor = cursors.encoder(start)
        self._read = start.mark
        """What comes next from the log, and under which epoch."""
        self._cancel_on_disconnect = cancel_on_disconnect
        self._num_open = sum(not choice.is_closed for choice in self._choices)
        self._num_waiting = 0
        self._is_late = False
        self._has_expired = False
        self._news: dict[Choice, None] = {choice: None for choice in self._choices if choice.has_news}
        """The choices that have something to take, in the order they got it."""

        # When events are due.
        self._urgent = False
        self._next_flush = 0.0
        self._client: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = asyncio.Event()
        """Set when the client has taken something, and at the end."""
        if self._num_open == 0:
            self._end(State.FINISHED)

    def published(self, request_offset: int) -> None:
        """The request's record lies there. Cursors are good from now on."""
        self._encode_cursor = self._cursors.encoder(replace(self._start, request_offset=request_offset))

    # The client's side.

    @property
    def cursor(self) -> str:
        """Where the client stands."""
        unread = [mark for choice in self._choices if (mark := choice.oldest) is not None]
        return self._encode_cursor(min(unread, default=self._read), [choice.place for choice in self._choices])

    @property
    def at_end(self) -> bool:
        """Whether the client has every choice's end."""
        return self._num_open == 0 and not self._news

    @property
    def is_answered(self) -> bool:
        """Whether engines have ended every choice, or were told where; not where only the clock ended one here."""
        return self.state is State.FINISHED and not self._has_expired

    @property
    def mark(self) -> Mark:
        """Where what comes next from the log lies at the earliest."""
        return self._read

    @property
    def epoch(self) -> int:
        """The epoch of the source partition below which a record counts for nothing here."""
        return self._read.epoch

    @property
    def ends(self) -> list[ChoiceEnd]:
        """How those choices ended that did."""
        return [choice.end for choice in self._choices if choice.end is not None]

    @property
    def num_shown(self) -> list[int]:
        """For each choice the tokens that were shown, or wait to be taken."""
        return [choice.num_shown for choice in self._choices]

    async def next(self, *, timeout: float | None = None) -> list[Tokens | Finished]:
        """All that is there, at least one event, once it is due: the first tokens of a choice, an end, and half of what
        may wait at once, the rest at most every `flush` seconds. [] after `timeout` seconds without any. Not to be called at the end.

        Raises:
            HoldfastError: the answer is broken.
        """
        assert not self.at_end and self._client is None
        if not self._is_due():
            self._client = self._loop.create_future()
            self._set_timer()
            try:
                async with asyncio.timeout(timeout):
                    await self._client
            except TimeoutError:
                return []
            finally:
                self._client = None
                self._clear_timer()
        if self.error is not None:
            raise self.error
        self._urgent = False
        self._next_flush = self._loop.time() + self._flush
        news, self._news, self._num_waiting = self._news, {}, 0
        self._taken.set()
        return [event for choice in news for event in choice.take(lambda: self.cursor)]

    def close(self) -> None:
        """The client is gone. Changes nothing where the answer has ended."""
        if self.state is State.OPEN:
            self._end(State.CLOSED)
            if self._cancel_on_disconnect:
                self._cancel(None, "the client left")

    # The log's side.

    async def room(self) -> bool:
        """Returns True when there is room for more, False when there is no need of it."""
        while self.state is State.OPEN and sum(c.num_pending for c in self._choices) * 2 > self._max_waiting:
            self._taken.clear()
            await self._taken.wait()
        return self.state is State.OPEN

    def caught_up(self, mark: Mark) -> None:
        """What comes next from the log lies at or after that, and is given as it comes."""
        self._read = mark
        self.is_behind = False
        self._end_if_late()

    def accept(self, part: Part, *, offset: int, epoch: int) -> Choice | None:
        """Takes what a record at `offset` says about one choice. Returns the choice if it may have something to decode."""
        if self.state is not State.OPEN:
            return None
        self._read = Mark(offset + 1, epoch)
        if part.choice >= len(self._choices):
            self.fail(StreamFailed(f"the log holds tokens of choice {part.choice} of {len(self._choices)}"))
            return None
        choice = self._choices[part.choice]
        return None if choice.is_closed else self._accept(choice, part, Mark(offset, epoch))

    def _accept(self, choice: Choice, part: Part, mark: Mark) -> Choice | None:
        try:
            choice.accept(part, mark=mark)
        except AlreadyExists as error:
            self.lose(error)  # the request that has the id is another one: a cancellation would end that
            return None
        except HoldfastError as error:
            self.fail(error)
            return None
        if choice.is_closed:
            self._changed(choice, urgent=True)
            return None
        return choice

    def decoded(self, choice: Choice, pieces: Sequence[Piece], texts: Sequence[str], num_consumed: int) -> None:
        """Takes the text of a choice's ids."""
        if self.state is not State.OPEN or choice.is_closed:
            return
        is_first, num_before = choice.is_untouched, choice.num_waiting
        choice.decoded(pieces, texts, num_consumed)
        if num_new := choice.num_waiting - num_before:
            self.last_token_at = self._loop.time()
            self.first_token_at = self.first_token_at or self.last_token_at
            self._num_waiting += num_new
        self._changed(choice, urgent=is_first or choice.is_closed)
        if not self.is_behind and self._num_waiting > self._max_waiting and self.state is State.OPEN:
            self.is_behind = True
            self._on_overflow(self)
        self._end_if_late()

    def fail(self, error: HoldfastError) -> None:
        """The answer cannot go on, and nobody can go on with it: the request ends, too."""
        if self.state is State.OPEN:
            self._break(error)
            self._cancel(None, f"its stream failed: {error}")

    def lose(self, error: HoldfastError) -> None:
        """This gateway cannot follow the answer any more; the request goes on."""
        if self.state is State.OPEN:
            self._break(error)

    @contextmanager
    def expiring(self, time_left: float | None) -> Iterator[None]:
        """Ends the answer after so many seconds, though no engine should be there to do it; None for never."""
        if time_left is None:
            yield
            return
        timer = self._loop.call_later(time_left, self.expire)
        try:
            yield
        finally:
            timer.cancel()

    def expire(self) -> None:
        """The deadline passed: every open choice ends with what the log has of it, as soon as that is shown."""
        self._is_late = True
        self._end_if_late()

    def _end_if_late(self) -> None:
        is_awaited = self.is_behind or any(choice.awaits_text for choice in self._choices)
        if not self._is_late or is_awaited or self.state is not State.OPEN:
            return
        self._has_expired = True
        self._cancel(None, "its deadline passed")
        for choice in self._choices:
            if not choice.is_closed:
                choice.cut(FinishReason.DEADLINE)
                self._changed(choice, urgent=True)

    def _stop_string(self, choice: int) -> None:
        self._cancel(choice, "a stop string was found")

    def _break(self, error: HoldfastError) -> None:
        self.error = error
        self._news.clear()
        self._end(State.BROKEN)
        self._wake()

    def _end(self, state: State) -> None:
        assert self.state is State.OPEN
        self.state = state
        self._taken.set()
        self._on_end(self)

    # When events are due.

    def _changed(self, choice: Choice, *, urgent: bool) -> None:
        if choice.has_news:
            self._news[choice] = None
            self._urgent = self._urgent or urgent
        if choice.is_closed:
            self._num_open -= 1
            if self._num_open == 0:
                self._end(State.FINISHED)
        if self._client is not None:
            self._wake() if self._is_due() else self._set_timer()

    def _is_due(self) -> bool:
        if self.error is not None:
            return True
        if not self._news:
            return False
        return self._urgent or self._num_waiting * 2 >= self._max_waiting or self._loop.time() >= self._next_flush

    def _set_timer(self) -> None:
        """Wakes the client when what waits for it is due."""
        if self._timer is None and self._news:
            self._timer = self._loop.call_at(self._next_flush, self._wake)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        if self._client is not None and not self._client.done():
            self._client.set_result(None)
