"""Ways to run several things at once, each under a parent, with errors that stay what they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raises the first error of a task group as itself: the other tasks were only cancelled by it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__


async def all_of(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Does them all at once; the first error ends the others and is raised."""
    with unwrapped():
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)


@asynccontextmanager
async def running(*works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Runs what never ends by itself while the block runs. Where one fails the block is cancelled and its error raised."""
    with unwrapped():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()


@asynccontextmanager
async def together(
    first: AbstractAsyncContextManager[A], second: AbstractAsyncContextManager[B]
) -> AsyncIterator[tuple[A, B]]:
    """Enters both, and leaves both at once: the drain of one does not wait for that of the other."""
    leave = asyncio.Event()

    async def hold(context: AbstractAsyncContextManager[T], entered: asyncio.Future[T]) -> None:
        async with context as value:
            entered.set_result(value)
            await leave.wait()

    loop = asyncio.get_running_loop()
    a: asyncio.Future[A] = loop.create_future()
    b: asyncio.Future[B] = loop.create_future()
    with unwrapped():
        async with asyncio.TaskGroup() as group:
            group.create_task(hold(first, a))
            group.create_task(hold(second, b))
            try:
                yield await a, await b
            finally:
                leave.set()
