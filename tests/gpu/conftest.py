"""Everything here needs a CUDA device, and is skipped where there is none: CI has none.

Tests that take the fixture `device` also run on a CPU, if `HOLDFAST_GPU_TESTS_ON=cpu` says so: that proves the tests.
"""

from __future__ import annotations

import os

import pytest
import torch

_ELSEWHERE = os.environ.get("HOLDFAST_GPU_TESTS_ON")


@pytest.fixture
def device() -> str:
    """Where to compute."""
    return _ELSEWHERE or "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(300))
            runs_elsewhere = _ELSEWHERE and "device" in getattr(item, "fixturenames", ())
            if not torch.cuda.is_available() and not runs_elsewhere:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
