"""Everything here needs a CUDA device, and is skipped where there is none: CI has none.

Tests that take the fixture `device` also run on a CPU, if `HOLDFAST_GPU_TESTS_ON=cpu` says so: that proves the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

_ELSEWHERE = os.environ.get("HOLDFAST_GPU_TESTS_ON")


@pytest.fixture
def device() -> str:
    """Where to compute."""
    return _ELSEWHERE or "cuda"


@pytest.fixture
def real_shape(tmp_path: Path) -> Path:
    """A folder with the config of two layers as wide as Llama-3.1-8B's."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(300))
            runs_elsewhere = _ELSEWHERE and "device" in getattr(item, "fixturenames", ())
            if not torch.cuda.is_available() and not runs_elsewhere:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
