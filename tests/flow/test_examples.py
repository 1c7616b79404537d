"""The examples run as they are printed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, OpenBus
from tests.flow.mesh import Running, environment, running


async def output(mesh: Running, name: str, *arguments: str) -> str:
    """What an example prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "examples" / name),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment() | {"HOLDFAST_ADDRESS": mesh.grpc, "PYTHONPATH": str(ROOT)},
    )
    out, err = await asyncio.wait_for(process.communicate(), 100)
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode()


async def test_stream(open_memory: OpenBus, stories260k: Path) -> None:
    """A continuation of 50 tokens."""
    async with running(open_memory, stories260k) as mesh:
        out = await output(mesh, "stream.py", "Once upon a time")
    assert out.endswith("\n(50 tokens; length)\n")


async def test_cancel(open_memory: OpenBus, endless_stories: Path) -> None:
    """An endless answer, ended by its id."""
    async with running(open_memory, endless_stories) as mesh:
        out = await output(mesh, "cancel.py")
    assert out.endswith(" tokens; cancelled)\n")


@pytest.mark.timeout(300)
async def test_chat(open_memory: OpenBus, smollm2: Path) -> None:
    """Two turns, the second of which leans on the first."""
    async with running(open_memory, smollm2, engine={"cache_bytes": 128 << 20, "threads": 2}) as mesh:
        first, second = (await output(mesh, "chat.py")).splitlines()
    assert "Paris" in first
    assert "Eiffel" in second
