"""Processes of this machine, as Linux tells of them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.engine.engines import until


def ranks_of(pid: int | None = None) -> list[int]:
    """The ranks that a process, by default this one, has started, in their order."""
    stats = {int(folder.name): _stat(folder.name) for folder in Path("/proc").glob("[0-9]*")}
    ours = [each for each, stat in stats.items() if stat[1:2] == [str(pid or os.getpid())]]
    return sorted(each for each in ours if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text())


async def gone(pids: list[int]) -> None:
    """Returns when none of them runs any more."""
    async with asyncio.timeout(20):
        await until(lambda: all(_stat(str(pid))[:1] in ([], ["Z"]) for pid in pids))


def _stat(pid: str) -> list[str]:
    """State, parent and more; nothing of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
