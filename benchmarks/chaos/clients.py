"""Clients that stream, check every token, and sometimes leave and come back elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.client import Answer, Client, Options
from holdfast.errors import HoldfastError, RetryableError
from holdfast.events import Accepted, Event, Finished, FinishReason, Tokens

WHO = ("little girl", "big dog", "tree", "boy named Tim", "red bird", "cat")
DID = ("went to the park.", "was very sad.")

SILENCE = 1.0
"""Seconds without an event that count as a silence: somebody who reads along would notice."""

LEAVES = 0.25
"""Of the streams are left in the middle by their client, which comes back."""

AWAY = 3.0
"""Seconds that it is away at most."""


class Task(NamedTuple):
    """What a client asks for."""

    prompt: str
    max_tokens: int
    stop: str = ""
    frequency_penalty: float = 0.0
    num_choices: int = 1

    @property
    def options(self) -> Options:
        """As a client gives them."""
        return Options(
            max_tokens=self.max_tokens,
            stop=[self.stop] if self.stop else [],
            frequency_penalty=self.frequency_penalty,
            num_choices=self.num_choices,
            temperature=0,
            return_token_ids=True,
        )


class Text(NamedTuple):
    """An answer; of several choices each, for nothing is drawn."""

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    stop: str = ""
    """The stop string that ended it."""


def tasks(lengths: Sequence[int]) -> list[Task]:
    """All that clients ask for."""
    prompts = [f"Once upon a time there was a {who} that {did}" for who in WHO for did in DID]
    return [Task(prompt, length) for prompt, length in itertools.product(prompts, lengths)]


def variants(plain: Mapping[Task, Text]) -> list[Task]:
    """The same tasks so that a new owner must know more than their tokens: with a stop string that the text has in its
    second half, with a penalty of what was said before, and as two choices."""
    return [
        variant
        for task, whole in plain.items()
        for variant in (
            task._replace(stop=whole.text[len(whole.text) * 3 // 5 :][:8]),
            task._replace(frequency_penalty=0.5),
            task._replace(num_choices=2),
        )
    ]


@dataclass(slots=True)
class Stream:
    """What a client saw of one request. Times are of `time.monotonic`."""

    task: Task
    asked: float
    accepted: float = 0.0
    """0 where it was not."""
    first_token: float = 0.0
    ended: float = 0.0
    """However it did; 0 where it did not."""
    silences: list[tuple[float, float]] = field(default_factory=list)
    """From one event to the next, where that took long."""
    num_returns: int = 0
    """How often its client left and came back."""
    failure: str = ""
    """What went wrong with it after it was accepted."""
    refusal: str = ""
    """Why it was not accepted."""
    retry_after: float = 0.0
    """Seconds after which its client may come again."""

    @property
    def has_held(self) -> bool:
        """Whether its client has the whole text, and every token once."""
        return bool(self.accepted and self.ended) and not self.failure


class Clients:
    """Many clients, each of which asks for one answer after the other until it is told to stop."""

    def __init__(
        self, addresses: Sequence[str], expected: Mapping[Task, Text], *, seed: int, leaves: float = LEAVES
    ) -> None:
        """`expected`: the answers of a mesh that nobody disturbs. `leaves`: the share of streams that their client leaves in
        the middle, and comes back to."""
        self.streams: list[Stream] = []
        self._addresses = list(addresses)
        self._expected = expected
        self._draw = random.Random(seed)
        self._leaves = leaves
        self._stopping = asyncio.Event()

    async def run(self, count: int, *, pause: float) -> None:
        """Returns when they were told to stop and have their last answers. `pause`: seconds between two, at most."""
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self._live(pause))

    def stop(self) -> None:
        """They ask for nothing more."""
        self._stopping.set()

    async def _live(self, pause: float) -> None:
        await self._rest(pause)
        while not self._stopping.is_set():
            stream = await self.ask()
            await self._rest(max(pause, stream.retry_after))

    async def _rest(self, most: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), self._draw.uniform(0.5, 1.0) * most)
        except TimeoutError:
            pass

    async def ask(self) -> Stream:
        """Streams one answer."""
        stream = Stream(self._draw.choice(list(self._expected)), time.monotonic())
        self.streams.append(stream)
        events: list[Event] = []
        leave_at = self._draw.randrange(1, stream.task.max_tokens) if self._draw.random() < self._leaves else None
        try:
            cursor = await self._begin(stream, events, leave_at)
            while cursor:
                stream.num_returns += 1
                await asyncio.sleep(self._draw.uniform(0.0, AWAY))
                cursor = await self._return(stream, events, cursor)
            stream.failure = check(events, self._expected[stream.task], num_choices=stream.task.num_choices)
        except HoldfastError as error:
            said = f"{type(error).__name__}: {error}"
            if stream.accepted:
                stream.failure = said
            else:
                stream.refusal = said
                stream.retry_after = error.retry_after if isinstance(error, RetryableError) else 0.0
        stream.ended = time.monotonic()  # not where the client is told to give up: such a stream has no end
        return stream

    async def _begin(self, stream: Stream, events: list[Event], leave_at: int | None) -> str:
        """Returns the cursor at which the client left; none where it stayed to the end."""
        async with Client(self._known()) as client:
            answer = client.generate(stream.task.prompt, cancel_on_exit=False, **stream.task.options)
            return await self._listen(answer, stream, events, leave_at)

    async def _return(self, stream: Stream, events: list[Event], cursor: str) -> str:
        async with Client(self._known()) as client:
            return await self._listen(client.resume(cursor), stream, events, None)

    def _known(self) -> list[str]:
        """All gateways, in any order."""
        return self._draw.sample(self._addresses, len(self._addresses))

    async def _listen(self, answer: Answer, stream: Stream, events: list[Event], leave_at: int | None) -> str:
        last = time.monotonic()
        async with answer:
            async for event in answer:
                now = time.monotonic()
                if now - last >= SILENCE and stream.accepted:
                    stream.silences.append((last, now))
                last = now
                if isinstance(event, Accepted):
                    stream.accepted = now
                if isinstance(event, Tokens) and not stream.first_token:
                    stream.first_token = now
                events.append(event)
                if leave_at is not None and isinstance(event, Tokens) and event.first_index >= leave_at:
                    return event.cursor
        return ""


def check(events: Sequence[Event], expected: Text, *, num_choices: int = 1) -> str:
    """What is wrong with an answer; nothing where each choice is as it should be, token by token."""
    choices: list[list[Tokens | Finished]] = [[] for _ in range(num_choices)]
    for event in events:
        if isinstance(event, Tokens | Finished):
            choices[event.choice].append(event)
    return next(filter(None, (_check_choice(choice, expected) for choice in choices)), "")


def _check_choice(events: Sequence[Tokens | Finished], expected: Text) -> str:
    token_ids: list[int] = []
    text = ""
    for event in events:
        if isinstance(event, Tokens):
            if event.first_index != len(token_ids):
                return f"token {event.first_index} came where {len(token_ids)} was due"
            token_ids += event.token_ids
            text += event.text
    ends = [event for event in events if isinstance(event, Finished)]
    if len(ends) != 1:
        return "it has not one end"
    if tuple(token_ids) != expected.token_ids:
        num_same = len(os.path.commonprefix([tuple(token_ids), expected.token_ids]))
        return f"another text from token {num_same} on: it has {len(token_ids)}, and {len(expected.token_ids)} were due"
    if text != expected.text:
        return "another text of the same tokens"
    if (ends[0].reason, ends[0].stop) != (expected.reason, expected.stop):
        return f"it ended with {ends[0].reason.name} {ends[0].stop!r}, and {expected.reason.name} {expected.stop!r} was due"
    num_tokens = ends[0].usage.completion_tokens
    return "" if num_tokens >= len(token_ids) else f"it ended with a count of {num_tokens} tokens of {len(token_ids)}"


async def undisturbed(address: str, wanted: Sequence[Task]) -> dict[Task, Text]:
    """The answers of a mesh that nobody disturbs, each alone. Raises ValueError where two choices of one differ."""
    expected = {}
    async with Client(address) as client:
        for task in wanted:
            events = [event async for event in client.generate(task.prompt, **task.options)]
            first = [event for event in events if isinstance(event, Tokens) and event.choice == 0]
            token_ids = tuple(each for event in first for each in event.token_ids)
            end = next(event for event in events if isinstance(event, Finished))
            expected[task] = Text("".join(event.text for event in first), token_ids, end.reason, end.stop)
            if wrong := check(events, expected[task], num_choices=task.num_choices):
                raise ValueError(f"{task}: where nobody disturbs it, {wrong}")
    return expected
