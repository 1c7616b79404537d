"""What computes, built from settings and a folder; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.build import Computer, build
from services.engine.settings import EngineSettings

CONTEXT = 512
"""Of the checkpoint."""
TOKEN_BYTES = 5 * 2 * 4 * 8 * 4
"""Layers, keys and values, heads, their size, float32."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Building sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def built(folder: Path, **settings: object) -> Computer:
    given = {"device": "cpu", "block_size": 16, "threads": 1, "cache_bytes": 1 << 20, **settings}
    return build(EngineSettings(**given), folder)  # type: ignore[arg-type]


def test_the_cache_is_as_large_as_it_may_be(stories260k: Path) -> None:
    """As many whole blocks as `cache_bytes` holds, unless `cache_blocks` says how many."""
    assert built(stories260k).cache.num_blocks == (1 << 20) // (16 * TOKEN_BYTES)
    assert built(stories260k, cache_blocks=7).cache.num_blocks == 7


def test_sequences_are_as_long_as_model_and_cache_allow(stories260k: Path) -> None:
    """The context, or what the cache holds where that is less, or what was asked for."""
    assert built(stories260k).max_model_len == CONTEXT
    assert built(stories260k, cache_blocks=7).max_model_len == 7 * 16
    assert built(stories260k, max_model_len=100).max_model_len == 100


def test_a_cache_too_small_for_one_sequence_is_refused(stories260k: Path) -> None:
    """By name, with what would be right."""
    with pytest.raises(ConfigurationError, match=r"too small for one sequence of max_model_len \(200\).*hold 112"):
        built(stories260k, cache_blocks=7, max_model_len=200)


def test_a_longer_context_than_the_models_is_refused(stories260k: Path) -> None:
    """Its positions end."""
    with pytest.raises(ConfigurationError, match="max_model_len is 513, but the model's context has 512"):
        built(stories260k, max_model_len=513)


def test_a_cache_of_less_than_two_blocks_is_refused(stories260k: Path, tmp_path: Path) -> None:
    """With the size of a block: here of a model with wider keys."""
    config = json.loads((stories260k / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 256}))
    with pytest.raises(
        ConfigurationError, match=r"64 tokens takes 2,621,440 bytes; cache_bytes \(1,048,576\) must hold"
    ):
        built(tmp_path, block_size=64, load_format="dummy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(stories260k: Path) -> None:
    """And auto takes the CPU then."""
    with pytest.raises(ConfigurationError, match="PyTorch sees no CUDA device"):
        built(stories260k, device="cuda")
    assert built(stories260k, device="auto").device.type == "cpu"


def test_dtype_and_threads_are_as_the_settings_say(stories260k: Path) -> None:
    """auto is what the config says."""
    assert built(stories260k).model.kv_shape.dtype is torch.float32
    assert built(stories260k, dtype="bfloat16", threads=2).cache.data.dtype is torch.bfloat16
    assert torch.get_num_threads() == 2


def test_dummy_weights_need_no_files(stories260k: Path, tmp_path: Path) -> None:
    """The config is enough."""
    (tmp_path / "config.json").write_bytes((stories260k / "config.json").read_bytes())
    assert built(tmp_path, load_format="dummy").model.vocab_size == 512
