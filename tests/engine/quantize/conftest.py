"""What calibrates a toy."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def text(shared: Path, tmp_path: Path) -> Path:
    """Enough of one for a toy."""
    path = tmp_path / "text.txt"
    published = (shared / "data" / "checkpoints" / "stories260k" / "expected_greedy_200.txt").read_text()
    path.write_text(published * 4)
    return path
