"""`python -m services` as a program: what `make run` starts."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
from pathlib import Path
from typing import Any

from tests.flow.mesh import ANYWHERE, command, environment

ADDRESSES = [f"--gateway.address={ANYWHERE}", f"--gateway.http-address={ANYWHERE}"]


async def start(*flags: str, **streams: Any) -> asyncio.subprocess.Process:
    """The whole mesh as a process; its settings are arguments of `python -m services`."""
    return await asyncio.create_subprocess_exec(
        *command(), *flags, *ADDRESSES, env=environment(), limit=1 << 20, **streams
    )


async def until(process: asyncio.subprocess.Process, text: str) -> str:
    """What it prints up to and with the line that holds `text`."""
    assert process.stdout is not None
    printed = ""
    while text not in printed:
        line = await asyncio.wait_for(process.stdout.readline(), 100)
        assert line, f"it ended after printing: {printed}"
        printed += line.decode()
    return printed


async def test_it_answers_a_question_shows_its_pace_and_ends_where_nobody_sits(
    stories260k: Path, published: str
) -> None:
    """Standard input is no terminal here, so nothing is left to wait for."""
    process = await start(
        f"--model={stories260k}",
        "--ask=Once upon a time",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 100)
    assert (process.returncode, err.decode()) == (0, "")
    text = out.decode()
    assert published.removeprefix("Once upon a time")[:100] in text
    assert re.search(r"\[\d+ tokens, first after \d+\.\d\d s, then [\d.]+ tokens/s\]", text)
    assert "nobody sits at a terminal" in text
    for part in ("tokenizer", "engine", "gateway"):
        assert re.search(rf"^  {part}: ready after [\d.]+ s$", text, re.MULTILINE)


async def test_at_a_terminal_it_goes_on_serving_and_says_how_to_go_on(stories260k: Path) -> None:
    """Until Ctrl-C, which drains it."""
    terminal, stdin = pty.openpty()
    try:
        process = await start(
            f"--model={stories260k}", "--ask=Once upon a time", stdin=stdin, stdout=asyncio.subprocess.PIPE
        )
        text = await until(process, "Ctrl-C ends it.")
        address = re.search(r"gRPC on ([\d.:]+)", text)
        assert address is not None
        assert "/v1/chat/completions" in text
        asking = [
            sys.executable,
            "-m",
            "holdfast.cli",
            "--address",
            address[1],
            "generate",
            "One day",
            "--max-tokens=5",
        ]
        asked = await asyncio.create_subprocess_exec(*asking, stdout=asyncio.subprocess.PIPE)
        answer, _ = await asyncio.wait_for(asked.communicate(), 60)
        assert asked.returncode == 0
        assert len(answer) > 1
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        os.close(stdin)
        os.close(terminal)


async def test_a_stop_in_the_middle_of_the_answer_ends_it(endless_stories: Path) -> None:
    """Ctrl-C during the first answer is not an error."""
    process = await start(f"--model={endless_stories}", "--ask=Once", "--no-exit", stdout=asyncio.subprocess.PIPE)
    await until(process, "> Once")
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_settings_of_each_part_are_flags_and_variables() -> None:
    """--help lists them."""
    process = await asyncio.create_subprocess_exec(
        *command(), "--help", stdout=asyncio.subprocess.PIPE, env=environment()
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert out.startswith(b"usage: python -m services ")
    for word in (
        "function",
        "factory",
        "--gateway.kafka",
        "--gateway.tokenizer",
        "--engine.model",
        "--tokenizer.model",
    ):
        assert word not in out.decode()
    for flag in ("--model", "--ask", "--exit", "--gateway.flush-ms", "--engine.cache-bytes", "--tokenizer.threads"):
        assert flag in out.decode()
