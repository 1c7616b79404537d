"""Runs chat templates in a process of its own, where one that takes too long or too much memory is ended.

A sandbox keeps a template from getting out; nothing in it keeps a template from looping or growing for ever. The
process has a limit on its memory, and the service ends it when an answer takes too long; the next conversation gets a
new one. Requests and answers are JSON behind four bytes that say how long it is, one at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from services.tokenizer.chat import ChatTemplates, TemplateError
from services.tokenizer.plain import PlainText, new_mark, pieces

_MEMORY_BYTES = 512 << 20
"""Address space of the process."""

_START_SECONDS = 60.0
"""Longest time that the process may take to start and to compile the templates."""

_MOST_PIECES = 1 << 14
"""What the service still reads in no time."""

_CHECKOUT = Path(__file__).parents[2]


class Renderer:
    """A model's chat templates in their process. Conversations are rendered one after another."""

    def __init__(
        self,
        templates: dict[str, str],
        special_tokens: dict[str, str],
        *,
        limit_seconds: float,
        unsayable: Sequence[str] = (),
    ) -> None:
        """`special_tokens`: by the names that templates know. `unsayable`: those that a request may not write."""
        self._hello = {"templates": templates, "special_tokens": special_tokens, "unsayable": list(unsayable)}
        self._limit_seconds = limit_seconds
        self._one_at_a_time = asyncio.Lock()
        self._process: Process | None = None
        self._turn: asyncio.Task[list[str]] | None = None
        """The latest; `stop` ends it."""

    async def render(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], *, continue_final: bool = False
    ) -> list[str]:
        """What `ChatTemplates.render` gives, cut so that no piece has a special token of the request's. A caller that leaves disturbs no other: its answer is read all the same.

        Raises:
            TemplateError: what that raises, or the template took too long, or its process died of it.
        """
        return await self._in_turn({"messages": messages, "variables": variables, "continue_final": continue_final})

    async def start(self) -> None:
        """Starts the process, if it does not run yet.

        Raises:
            TemplateError: a template is not valid Jinja.
        """
        await self._in_turn(None)

    async def stop(self) -> None:
        """Ends what is being rendered, and the process."""
        if self._turn is not None:
            self._turn.cancel()
            await asyncio.gather(self._turn, return_exceptions=True)
        await self._kill()

    async def _in_turn(self, request: dict[str, Any] | None) -> list[str]:
        """Has a request answered, nothing asked for where there is none. The turn is the renderer's, not its caller's:
        left half way, its answer would be read by the next."""
        await self._one_at_a_time.acquire()
        # A task by itself: an exchange outlives the caller that began it, and a task group would end with the first
        # template that fails. The lock lets no second one be, `stop` waits for its end.
        self._turn = asyncio.create_task(self._take_turn(request))
        return await asyncio.shield(self._turn)

    async def _take_turn(self, request: dict[str, Any] | None) -> list[str]:
        try:
            process = self._process or await self._start()
            return [] if request is None else await self._ask(process, request, limit_seconds=self._limit_seconds)
        finally:
            self._one_at_a_time.release()

    async def _kill(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            with suppress(ProcessLookupError):  # it may have ended by itself
                process.kill()
            await process.wait()

    async def _start(self) -> Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", __name__),
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(_CHECKOUT), os.environ.get("PYTHONPATH", "")])},
            start_new_session=True,  # a terminal's interrupt is the service's to answer
        )
        await self._ask(self._process, self._hello, limit_seconds=_START_SECONDS)
        return self._process

    async def _ask(self, process: Process, request: dict[str, Any], *, limit_seconds: float) -> list[str]:
        """The answer to one request. Whatever goes wrong in between ends the process: it may yet answer, too late."""
        try:
            async with asyncio.timeout(limit_seconds):
                answer = await _exchange(process, request)
        except TimeoutError:
            await self._kill()
            raise TemplateError(f"the chat template took more than {limit_seconds:g} seconds") from None
        except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
            await self._kill()
            raise TemplateError("the chat template ended its process: it needs too much memory") from None
        except BaseException:
            await self._kill()
            raise
        if "error" in answer:
            raise TemplateError(answer["error"])
        return [str(piece) for piece in answer["pieces"]]


async def _exchange(process: Process, request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_framed(request))
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "little")
    answer: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
    return answer


@asynccontextmanager
async def rendering(
    templates: dict[str, str], special_tokens: dict[str, str], *, limit_seconds: float, unsayable: Sequence[str] = ()
) -> AsyncIterator[Renderer]:
    """A renderer whose process runs, and ends with the block.

    Raises:
        TemplateError: a template is not valid Jinja.
    """
    renderer = Renderer(templates, special_tokens, limit_seconds=limit_seconds, unsayable=unsayable)
    try:
        await renderer.start()
        yield renderer
    finally:
        await renderer.stop()


def _framed(value: dict[str, Any]) -> bytes:
    content = json.dumps(value).encode()
    return len(content).to_bytes(4, "little") + content


def main() -> None:
    """The process: answers until its input ends, which it does when the service ends, however that ends."""
    if sys.platform == "linux":  # elsewhere the system does not keep this limit, and time alone is bounded
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    hello = _read(sys.stdin.buffer)
    templates: ChatTemplates | None = None
    plain = PlainText(hello["unsayable"] if hello is not None else ())
    while hello is not None:
        try:
            if templates is None:
                templates = ChatTemplates(hello["templates"], hello["special_tokens"])
                answer: dict[str, Any] = {"pieces": []}
            else:
                answer = {"pieces": _rendered(templates, plain, hello)}
        except TemplateError as error:
            answer = {"error": str(error)}
        sys.stdout.buffer.write(_framed(answer))
        sys.stdout.buffer.flush()
        hello = _read(sys.stdin.buffer)


def _rendered(templates: ChatTemplates, plain: PlainText, request: dict[str, Any]) -> list[str]:
    mark = new_mark()
    messages, variables = plain.marked([request["messages"], request["variables"]], mark)
    cut = pieces(templates.render(messages, variables, continue_final=request["continue_final"]), mark)
    if len(cut) > _MOST_PIECES:
        raise TemplateError(f"special tokens are spelled out {len(cut) - 1} times; at most {_MOST_PIECES - 1} can be")
    return cut


def _read(file: BinaryIO) -> dict[str, Any] | None:
    """The next request; nothing at the end."""
    size = file.read(4)
    if len(size) < 4:
        return None
    request: dict[str, Any] = json.loads(file.read(int.from_bytes(size, "little")))
    return request


if __name__ == "__main__":
    main()
