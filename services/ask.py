"""The first question: asked through the mesh's own front door, the answer shown as it grows, and how to go on."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from holdfast.cli import show
from holdfast.client import Client

_MAX_TOKENS = 256
"""Most tokens of the answer: it is there to be watched, not to be waited for."""


async def ask(address: str, question: str) -> None:
    """Asks the gateway at `address`; prints the answer as it grows, and then how fast it came.

    Raises:
        HoldfastError: there was no answer.
    """
    async with Client(address) as client:
        (model,) = await client.models()
        print(f"\n> {question}\n", flush=True)
        if model.chat:
            messages = [{"role": "user", "content": question}]
            answer = client.generate(messages=messages, temperature=0, max_tokens=_MAX_TOKENS)
        else:
            answer = client.generate(question, temperature=0, max_tokens=_MAX_TOKENS)
        print(f"\n[{await show(answer)}]", flush=True)


async def unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Awaits `work`, or cancels it when `stop` is set."""
    async with asyncio.TaskGroup() as tasks:
        working, stopping = tasks.create_task(work), tasks.create_task(stop.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        stopping.cancel()


def how_to_go_on(grpc: str, http: str, model: str) -> str:
    """What to type next, in another terminal."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]}
    there = "" if grpc == "127.0.0.1:50051" else f" --address {grpc}"
    return f"""
Serving {model}: gRPC on {grpc}, HTTP (OpenAI's API, health, metrics) on {http}.
Go on from another terminal:

  {_command()}{there} chat
  {_command()}{there} status
  curl -N http://{http}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}
"""


def _command() -> str:
    """The `holdfast` command of this environment, as one types it here."""
    command = Path(sys.executable).parent / "holdfast"
    if not command.exists():
        return f"{shlex.quote(sys.executable)} -m holdfast.cli"
    here = Path.cwd()
    return shlex.quote(str(command.relative_to(here) if command.is_relative_to(here) else command))
