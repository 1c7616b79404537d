"""`python -m services` as a program: what `make run` starts."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.events import Model
from services.ask import how_to_go_on
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
    """Until Ctrl-C, which drains it. The lines that it says do what they say, as they stand, for a model that cannot
    chat."""
    terminal, stdin = pty.openpty()
    try:
        process = await start(
            f"--model={stories260k}", "--ask=Once upon a time", stdin=stdin, stdout=asyncio.subprocess.PIPE
        )
        text = await until(process, "Ctrl-C ends it.")
        generate, status, curl = re.findall(r"^  (\S*(?:holdfast|python|curl) .*)$", text, re.MULTILINE)
        code, out = await shell(f"{generate} --max-tokens=5")
        assert (code, len(out) > 1) == (0, True)
        code, out = await shell(status)
        assert code == 0
        assert re.findall(r"^(\w+) .* serving$", out, re.MULTILINE) == ["gateway", "tokenizer", "engine", "kvstore"]
        code, out = await shell(curl)
        assert (code, out.endswith("data: [DONE]\n\n")) == (0, True)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        os.close(stdin)
        os.close(terminal)


async def shell(line: str) -> tuple[int | None, str]:
    """The exit code of a line, and what it prints."""
    process = await asyncio.create_subprocess_shell(line, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode()


def test_a_model_that_can_chat_is_chatted_with() -> None:
    """The default gateway needs no address."""
    model = Model(name="tiny", context_length=512, vocab_size=1000, chat=True, created=datetime.now(UTC))
    text = how_to_go_on(model, grpc="127.0.0.1:50051", http="127.0.0.1:8000", parts={"engine": "127.0.0.1:6000"})
    assert re.search(r"holdfast\S* chat$", text, re.MULTILINE)
    assert re.search(r"holdfast\S* status --engine 127.0.0.1:6000$", text, re.MULTILINE)
    assert "http://127.0.0.1:8000/v1/chat/completions" in text


async def test_without_a_question_it_ends_as_soon_as_it_is_ready_where_that_is_asked(stories260k: Path) -> None:
    """--exit is not forgotten."""
    process = await start(f"--model={stories260k}", "--exit", stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0
    assert out.decode().endswith("\nEnding, as asked.\n")


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
