"""Fixtures that every part uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def missing(what: str) -> None:
    """Skips the test on a laptop and fails it on CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set")
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout, or where `HOLDFAST_SHARED` says it is."""
    folder = Path(os.environ.get("HOLDFAST_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        missing(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A tiny trained Llama whose greedy text is published."""
    return shared / "data" / "checkpoints" / "stories260k"
