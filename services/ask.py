"""The first question: asked through the mesh's own front door, the answer shown as it grows, and how to go on."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from holdfast.cli import show
from holdfast.client import DEFAULT_ADDRESS, Client
from holdfast.events import Model

_MAX_TOKENS = 256
"""Most tokens of the answer: it is there to be watched, not to be waited for."""


async def ask(address: str, question: str) -> None:
    """Asks the gateway at `address`; prints the answer as it grows, and then how fast it came.

    Raises:
        HoldfastError: there was no answer.
    """
    model = await served(address)
    async with Client(address) as client:
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


async def served(address: str) -> Model:
    """The model that the mesh behind this gateway serves."""
    async with Client(address) as client:
        (model,) = await client.models()
        return model


def how_to_go_on(model: Model, *, grpc: str, http: str, parts: Mapping[str, str]) -> str:
    """What to type next, in another terminal. `parts`: where the other services listen, by name."""
    there = "" if grpc == DEFAULT_ADDRESS else f" --address {grpc}"
    others = "".join(f" --{name} {address}" for name, address in parts.items())
    if model.chat:
        talk, route = "chat", "chat/completions"
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
    else:
        talk, route, asked = 'generate "Once upon a time"', "completions", {"prompt": "Once upon a time"}
    body = shlex.quote(json.dumps({"model": model.name, "stream": True, **asked}))
    return f"""
Serving {model.name}: gRPC on {grpc}, HTTP (OpenAI's API, health, metrics) on {http}.
Go on from another terminal:

  {_command()}{there} {talk}
  {_command()}{there} status{others}
  curl -N http://{http}/v1/{route} -H 'content-type: application/json' -d {body}
"""


def _command() -> str:
    """The `holdfast` command of this environment, as one types it here."""
    command = Path(sys.executable).parent / "holdfast"
    if not command.exists():
        return f"{shlex.quote(sys.executable)} -m holdfast.cli"
    here = Path.cwd()
    return shlex.quote(str(command.relative_to(here) if command.is_relative_to(here) else command))
