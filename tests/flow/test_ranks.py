"""The mesh in one process, its engine in two more: what they say, and who outlives whom."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.ranks.processes import gone, ranks_of
from tests.flow.test_embedded import start, until


async def test_the_death_of_a_rank_ends_the_mesh_by_name(stories260k: Path, published: str) -> None:
    """Two ranks stream the published text; killed, idle as it is, one of them is named in the last line."""
    process = await start(
        f"--model={stories260k}", "--ask=Once upon a time", "--no-exit", "--engine.tensor-parallel=2",
        "--engine.threads=1", stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    text = await until(process, "Ctrl-C ends it.")
    assert published.removeprefix("Once upon a time")[:100] in text
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    lines = err.decode().splitlines()
    assert lines[-1] == f"holdfast: rank 1 (pid {ranks[1]}) was killed by SIGKILL"
    assert not any("Traceback" in line for line in lines)
    await gone(ranks)


async def test_ranks_do_not_outlive_their_front(stories260k: Path) -> None:
    """However it ends, and whatever they do: here it ends without a word, and one of them is stopped."""
    process = await start(
        f"--model={stories260k}", "--ask=", "--no-exit", "--engine.tensor-parallel=2", "--engine.threads=1", stdout=PIPE
    )  # fmt: skip
    await until(process, "Ctrl-C ends it.")
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)
    process.kill()
    await process.communicate()
    await gone(ranks)


@pytest.mark.parametrize("heads", ["num_attention_heads", "num_key_value_heads"])
def test_the_default_model_can_be_split_as_the_readme_says(smollm2: Path, heads: str) -> None:
    """The command there names no other model."""
    (count,) = re.findall(r"`python -m services\.engine --tensor-parallel (\d+)`", (ROOT / "README.md").read_text())
    assert json.loads((smollm2 / "config.json").read_text())[heads] % int(count) == 0
