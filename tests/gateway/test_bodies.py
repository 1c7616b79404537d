"""Bodies as they come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.errors import Overloaded, RequestTooLarge, RequestTooSlow
from services.gateway.bodies import MAX_BODY_BYTES, Bodies, ClientLeft


class Client:
    """Sends parts of a body when it is told to."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._taken: asyncio.Queue[None] = asyncio.Queue()

    async def receive(self) -> dict[str, Any]:
        self._taken.put_nowait(None)
        return await self._messages.get()

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Returns when it was taken, and more is asked for unless this was the end."""
        await self._taken.get()
        self._messages.put_nowait({"type": "http.request", "body": body, "more_body": more})
        if more:
            await self._taken.get()
            self._taken.put_nowait(None)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


def bodies(*, max_bytes: int = MAX_BODY_BYTES, seconds: float = 60.0) -> Bodies:
    return Bodies(max_bytes=max_bytes, seconds=seconds)


async def test_a_body_is_its_parts() -> None:
    """In their order."""
    client = Client()
    async with asyncio.TaskGroup() as group:
        body = group.create_task(bodies().read(client.receive, {}))
        await client.send(b"one ")
        await client.send(b"two", more=False)
    assert body.result() == b"one two"


async def test_bodies_have_room_together() -> None:
    """What does not fit beside those that are on their way is refused, and fits again once they ended, however that was."""
    room = bodies(max_bytes=10)
    ends: list[Callable[[Client], Any]] = [lambda client: client.send(b"", more=False), Client.leave]
    for end in ends:
        first, second, third = Client(), Client(), Client()
        async with asyncio.TaskGroup() as group:
            one = group.create_task(read(room, first))
            await first.send(b"123456")
            two = group.create_task(read(room, second))
            await second.send(b"12345", more=False)
            with pytest.raises(Overloaded, match="6 bytes are being read"):
                (await two).result()
            if (ending := end(first)) is not None:
                await ending
            await one
            three = group.create_task(read(room, third))
            await third.send(b"1234567890", more=False)
        assert three.result().result() == b"1234567890"


async def read(room: Bodies, client: Client) -> asyncio.Future[bytes]:
    """What reading came to, be it an error."""
    result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    try:
        result.set_result(await room.read(client.receive, {}))
    except (Overloaded, ClientLeft) as error:
        result.set_exception(error)
        result.exception()  # it may be of no interest
    return result


async def test_a_body_that_does_not_end_in_time_is_refused() -> None:
    """However much of it came."""
    client = Client()
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(bodies(seconds=0.01).read(client.receive, {}))
            await client.send(b"1")
    assert caught.group_contains(RequestTooSlow, match="within 0.01 seconds")


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_refused(announced: bool) -> None:
    """Before it is read where its length was announced."""
    client = Client()
    headers = {"content-length": str(MAX_BODY_BYTES + 1)} if announced else {}
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(bodies(max_bytes=2 * MAX_BODY_BYTES).read(client.receive, headers))
            if not announced:
                await client.send(b"x" * (MAX_BODY_BYTES + 1), more=False)
    assert caught.group_contains(RequestTooLarge)
