"""Models for the flow tests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from holdfast import models
from holdfast.errors import ConfigurationError
from holdfast.memory import MemoryBus
from tests.conftest import OpenBus, missing


@pytest.fixture(scope="session")
def published(stories260k: Path) -> str:
    """The text that stories260k writes greedily from nothing, as llama2.c publishes it: 199 tokens."""
    return (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def endless_stories(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a context so long that it does not come to its end within a test."""
    folder = tmp_path_factory.mktemp("models") / "endless-stories"
    folder.mkdir()
    for file in stories260k.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((stories260k / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 16}))
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model."""
    try:
        return models.resolve("smollm2-135m-instruct")
    except ConfigurationError as error:
        missing(f"no default model: {error}")
        raise


@pytest.fixture
async def open_memory() -> AsyncIterator[OpenBus]:
    """Opens connections to one log in memory."""
    async with MemoryBus() as bus:
        yield lambda: contextlib.nullcontext(bus)
