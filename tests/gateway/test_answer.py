"""When an answer's events are due, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from holdfast.accept import Prefix, Source, extend_hash
from holdfast.errors import AlreadyExists, StreamFailed
from holdfast.events import Finished, FinishReason, Tokens, Usage
from services.gateway.answer import Answer, State
from services.gateway.choice import Finish, Manner, Mark, Part, Place
from services.gateway.cursor import Cursor, Cursors

NEVER = 3600.0
CURSORS = Cursors()


@dataclass
class Feed:
    """An answer, and the hand of log and tokenizer on it."""

    num_choices: int = 1
    flush: float = 0.0
    max_waiting: int = 4096
    cancel_on_disconnect: bool = False
    ended: list[State] = field(default_factory=list)
    cancelled: list[int | None] = field(default_factory=list)
    overflown: int = 0
    offset: int = 70
    epoch: int = 5

    def __post_init__(self) -> None:
        self._written: dict[int, list[int]] = {index: [] for index in range(self.num_choices)}
        self.answer = Answer(
            Cursor("r-1", Source(1, 9), 8, 3, Mark(70, 4), (Place.at_start([1, 2]),) * self.num_choices),
            prompt_tokens=2,
            manner=Manner(),
            cursors=CURSORS,
            cancel_on_disconnect=self.cancel_on_disconnect,
            flush=self.flush,
            max_waiting=self.max_waiting,
            on_end=lambda answer: self.ended.append(answer.state),
            on_overflow=self._overflow,
            cancel=lambda choice, reason: self.cancelled.append(choice),
        )

    def _overflow(self, answer: Answer) -> None:
        self.overflown += 1

    def say(self, text: str, *, choice: int = 0, finish: FinishReason | None = None, decode: bool = True) -> None:
        """The next tokens of a choice, in a record of their own, with their text."""
        before = self._written[choice]
        end = Finish(finish, Usage(2, 0, 9)) if finish is not None else None
        self.accept(Part(choice, len(before), list(text.encode()), (), extend_hash(0, before), end), decode=decode)
        before += text.encode()

    def accept(self, part: Part, *, decode: bool = True) -> None:
        self.offset += 1
        choice = self.answer.accept(part, offset=self.offset, epoch=self.epoch)
        while choice is not None and decode and (pieces := choice.to_decode()):
            self.answer.decoded(choice, pieces, [bytes(pieces[0].ids).decode()], len(pieces[0].ids))


def texts(events: Sequence[Tokens | Finished]) -> list[str]:
    return [event.text if isinstance(event, Tokens) else event.reason.value for event in events]


async def test_the_first_tokens_and_the_end_come_at_once_and_the_rest_together() -> None:
    """However rarely events may come, a choice's first tokens and its end do not wait; what waits comes in one event."""
    feed = Feed(flush=NEVER)
    feed.say("a")
    assert texts(await feed.answer.next()) == ["a"]
    for text in "bcd":
        feed.say(text)
    assert await feed.answer.next(timeout=0.01) == []
    feed.say("e", finish=FinishReason.LENGTH)
    assert texts(await feed.answer.next()) == ["bcde", "length"]
    assert feed.answer.at_end


async def test_the_middle_comes_at_most_once_in_a_flush_time() -> None:
    """Tokens that come soon after an event wait for the rest of the flush time, and no longer."""
    feed = Feed(flush=0.05)
    feed.say("a")
    await feed.answer.next()
    before = asyncio.get_running_loop().time()
    feed.say("b")
    feed.say("c")
    assert texts(await feed.answer.next(timeout=5)) == ["bc"]
    assert 0.04 <= asyncio.get_running_loop().time() - before < 4


async def test_a_client_that_waits_is_woken_by_the_flush_time() -> None:
    """Tokens that come while the client waits are due when the flush time is over."""
    feed = Feed(flush=0.05)
    feed.say("a")
    await feed.answer.next()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(feed.answer.next(timeout=5))
        await asyncio.sleep(0)
        feed.say("b")
    assert texts(waiting.result()) == ["b"]


async def test_without_a_flush_time_every_token_is_due() -> None:
    """With flush 0 nothing waits."""
    feed = Feed(flush=0)
    for text in "abc":
        feed.say(text)
        assert texts(await feed.answer.next()) == [text]


async def test_the_first_tokens_of_every_choice_come_at_once() -> None:
    """A choice that begins late does not wait for the flush time of another."""
    feed = Feed(num_choices=2, flush=NEVER)
    feed.say("a")
    await feed.answer.next()
    feed.say("A", choice=1)
    assert texts(await feed.answer.next()) == ["A"]


async def test_choices_end_one_by_one() -> None:
    """The answer ends with its last choice; what comes for an ended one is ignored."""
    feed = Feed(num_choices=2)
    feed.say("a", finish=FinishReason.LENGTH)
    assert texts(await feed.answer.next()) == ["a", "length"]
    assert (feed.answer.at_end, feed.ended) == (False, [])
    feed.say("b")
    feed.say("A", choice=1, finish=FinishReason.STOP)
    assert texts(await feed.answer.next()) == ["", "stop"]
    assert (feed.answer.at_end, feed.ended, feed.answer.state) == (True, [State.FINISHED], State.FINISHED)


async def test_cursors_say_where_the_client_stands() -> None:
    """A cursor counts and hashes what was taken of each choice, and points at or before the first record that was not."""
    feed = Feed(num_choices=2, flush=NEVER)
    start = CURSORS.decode(feed.answer.cursor)
    assert (start.mark, start.reply_partition, start.request_offset) == (Mark(70, 4), 3, 8)
    assert start.places == (Place(context=(1, 2)),) * 2
    feed.say("ab")
    feed.say("c", choice=1, decode=False)
    (tokens,) = await feed.answer.next()
    now = CURSORS.decode(tokens.cursor)
    assert [place.prefix for place in now.places] == [Prefix(2, extend_hash(0, b"ab")), Prefix()]
    assert now.places[0].context == (1, 2, 97, 98)
    assert (now.mark, now.source) == (Mark(72, 5), Source(1, 9))
    assert CURSORS.decode(feed.answer.cursor) == now


async def test_a_cursor_has_the_epoch_that_held_at_its_offset() -> None:
    """Where the record to read on from was written by an earlier owner than the newest one, a reader that knew of the
    newest would ignore it."""
    feed = Feed(num_choices=2, flush=NEVER)
    feed.say("late", decode=False)
    feed.epoch = 6
    feed.say("A", choice=1)
    (tokens,) = await feed.answer.next()
    assert CURSORS.decode(tokens.cursor).mark == Mark(71, 5)


async def test_what_engines_say_of_themselves_is_no_event() -> None:
    """That one begins, that another goes on, that the first has let go: the client hears nothing of it, and its cursor has
    the same of every choice."""
    feed = Feed(flush=NEVER)
    feed.accept(Part(0, 0, (), (), 0))
    feed.say("ab")
    (tokens,) = await feed.answer.next()
    feed.epoch = 6
    feed.accept(Part(0, 2, (), (), extend_hash(0, b"ab")))
    feed.accept(Part(0, 0, (), (), 0))
    assert await feed.answer.next(timeout=0) == []
    before, after = CURSORS.decode(tokens.cursor), CURSORS.decode(feed.answer.cursor)
    assert (before.mark, after.mark) == (Mark(73, 5), Mark(75, 6))
    assert before.places == after.places
    feed.say("c", finish=FinishReason.LENGTH)
    assert texts(await feed.answer.next()) == ["c", "length"]


async def test_a_cursor_stands_before_an_end_that_was_not_told() -> None:
    """Of the cursor of the last text the end can be told again, of that of the end nothing can."""
    feed = Feed(num_choices=2)
    feed.say("a", finish=FinishReason.LENGTH)
    text, end = await feed.answer.next()
    (before, _), (after, other) = (CURSORS.decode(event.cursor).places for event in (text, end))
    assert before.end == after.end is not None
    assert (before.end_taken, after.end_taken, other.end) == (False, True, None)


async def test_an_answer_that_is_opened_at_its_end_is_at_its_end() -> None:
    """It has left OPEN, and nobody feeds it."""
    feed = Feed()
    feed.say("a", finish=FinishReason.LENGTH)
    last = CURSORS.decode((await feed.answer.next())[-1].cursor)
    ended: list[State] = []
    again = Answer(
        last,
        prompt_tokens=2,
        manner=Manner(),
        cursors=CURSORS,
        cancel_on_disconnect=True,
        flush=0,
        max_waiting=10,
        on_end=lambda answer: ended.append(answer.state),
        on_overflow=lambda answer: None,
        cancel=lambda choice, reason: ended.append(State.CLOSED),
    )
    again.close()
    assert (again.at_end, ended) == (True, [State.FINISHED])


async def test_a_client_that_leaves_cancels_where_it_said_so() -> None:
    """Closing an open answer cancels its request iff it asked for that; closing an ended one changes nothing."""
    for asked in (False, True):
        feed = Feed(cancel_on_disconnect=asked)
        feed.say("a")
        feed.answer.close()
        feed.answer.close()
        assert (feed.ended, feed.cancelled) == ([State.CLOSED], [None] * asked)
    feed = Feed(cancel_on_disconnect=True)
    feed.say("a", finish=FinishReason.LENGTH)
    feed.answer.close()
    assert (feed.ended, feed.cancelled) == ([State.FINISHED], [])


async def test_what_contradicts_breaks_the_answer_and_ends_the_request() -> None:
    """A record that does not fit breaks the answer; a client that waits is told, and the request is cancelled."""
    feed = Feed()
    feed.say("a")
    await feed.answer.next()
    asyncio.get_running_loop().call_soon(feed.accept, Part(0, 1, [98], (), prefix_hash=7))
    with pytest.raises(StreamFailed, match="another text"):
        await feed.answer.next(timeout=5)
    assert (feed.ended, feed.cancelled) == ([State.BROKEN], [None])


async def test_a_choice_that_was_not_asked_for_breaks_the_answer() -> None:
    """Tokens of a choice beyond num_choices are an error of whoever wrote them."""
    feed = Feed()
    feed.accept(Part(1, 0, [98], (), prefix_hash=0))
    with pytest.raises(StreamFailed, match="choice 1 of 1"):
        await feed.answer.next()


async def test_a_refusal_because_the_id_is_taken_cancels_nothing() -> None:
    """The answer breaks with AlreadyExists; a cancellation under this id would end the request that has it."""
    feed = Feed(cancel_on_disconnect=True)
    feed.accept(Part(0, 0, [], (), prefix_hash=0, finish=Finish(None, Usage(0, 0, 0), AlreadyExists("it runs"))))
    with pytest.raises(AlreadyExists, match="it runs"):
        await feed.answer.next()
    feed.answer.close()
    assert (feed.ended, feed.cancelled) == ([State.BROKEN], [])


async def test_a_client_that_reads_too_slowly_falls_behind() -> None:
    """More waiting tokens than allowed are told of once; there is room again when the client has taken them."""
    feed = Feed(max_waiting=4, cancel_on_disconnect=True)
    feed.say("abc")
    await feed.answer.next()
    feed.say("defgh")
    feed.say("i")
    assert (feed.answer.state, feed.overflown, feed.answer.mark, feed.cancelled) == (State.OPEN, 1, Mark(74, 5), [])
    async with asyncio.TaskGroup() as group:
        room = group.create_task(feed.answer.room())
        await asyncio.sleep(0)
        assert not room.done()
        assert texts(await feed.answer.next()) == ["defghi"]
    feed.answer.caught_up(Mark(80, 6))
    assert CURSORS.decode(feed.answer.cursor).mark == Mark(80, 6)
    feed.say("jklmno")
    assert feed.overflown == 2


async def test_half_of_what_may_wait_is_due_at_once() -> None:
    """The flush time does not make a client slow: at half of the limit events are due."""
    feed = Feed(flush=NEVER, max_waiting=4)
    feed.say("a")
    await feed.answer.next()
    feed.say("bc")
    assert texts(await feed.answer.next()) == ["bc"]


async def test_the_deadline_ends_every_open_choice_with_what_it_has() -> None:
    """At the deadline open choices end with DEADLINE and their text so far, ended ones stay, the request is cancelled."""
    feed = Feed(num_choices=2)
    feed.say("a", finish=FinishReason.STOP)
    feed.say("bc", choice=1)
    feed.answer.expire()
    assert texts(await feed.answer.next()) == ["", "stop", "bc", "deadline"]
    assert (feed.ended, feed.cancelled) == ([State.FINISHED], [None])
    feed.answer.expire()
    assert feed.cancelled == [None]


async def test_the_deadline_waits_for_what_the_log_has() -> None:
    """An answer that is read late, or whose text the tokenizer still owes, is not cut short: it ends with what the log has."""
    feed = Feed()
    feed.answer.is_behind = True  # as one that was just resumed
    feed.answer.expire()
    feed.say("the whole")
    feed.say(" text", finish=FinishReason.LENGTH)
    assert texts(await feed.answer.next()) == ["the whole text", "length"]

    feed = Feed()
    feed.say("abc", decode=False)
    feed.answer.expire()
    assert feed.answer.state is State.OPEN
    feed.say("d")  # and with it the rest is decoded
    assert texts(await feed.answer.next()) == ["abcd", "deadline"]

    feed = Feed()
    feed.answer.is_behind = True
    feed.say("ab")
    feed.answer.expire()
    assert feed.answer.state is State.OPEN
    feed.answer.caught_up(Mark(80, 6))
    assert texts(await feed.answer.next()) == ["ab", "deadline"]


async def test_a_client_that_leaves_while_its_answer_waits_for_room_is_fed_no_more() -> None:
    """Nor forgotten twice: who reads the log for it is told that there is no need."""
    feed = Feed(max_waiting=4)
    feed.say("abcd")
    async with asyncio.TaskGroup() as group:
        room = group.create_task(feed.answer.room())
        await asyncio.sleep(0)
        feed.answer.close()
    assert room.result() is False


async def test_a_lost_answer_breaks_and_its_request_goes_on() -> None:
    """Where this gateway cannot follow, nobody is cancelled."""
    feed = Feed(cancel_on_disconnect=True)
    feed.answer.lose(StreamFailed("gone"))
    with pytest.raises(StreamFailed, match="gone"):
        await feed.answer.next()
    feed.answer.close()
    assert feed.cancelled == []


async def test_when_tokens_came_is_known() -> None:
    """The times of the first and the last token are kept for metrics."""
    feed = Feed()
    times = []
    for text in "ab":
        times.append(feed.answer.first_token_at)
        feed.say(text)
        times.append(feed.answer.first_token_at)
    assert times[0] is None
    assert times[1] == times[2] == times[3] is not None
    assert feed.answer.last_token_at is not None
    assert feed.answer.last_token_at >= (times[3] or 0)
