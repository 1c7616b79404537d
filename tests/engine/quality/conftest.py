"""The published text as passages, and models that differ in the format of their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.models import Model, load
from services.engine.quality.forced import Forced
from services.engine.quality.passages import Passage, tokenizer_of, windows_of

WINDOW = 48


@pytest.fixture(scope="session")
def windows(stories260k: Path) -> list[Passage]:
    """Three of the published text."""
    text = (stories260k / "expected_greedy_200.txt").read_text()
    return windows_of(text, tokenizer_of(stories260k), length=WINDOW, most_tokens=150)


def forced(folder: Path, quantization: str = "none") -> Forced:
    """A model of this folder, with a cache for one window at least."""
    return around(load(folder, quantization=quantization), name=quantization)


def around(model: Model, *, name: str = "model") -> Forced:
    return Forced.of(name, model, longest=2 * WINDOW)
