"""What computes, built from settings and a folder; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.build import Computer, build
from services.engine.kv_format import KVFormat
from services.engine.settings import Capacity, EngineSettings
from services.engine.shard import ALONE, Shard

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


def built(folder: Path, shard: Shard = ALONE, **settings: object) -> Computer:
    given = {"device": "cpu", "block_size": 16, "threads": 1, "cache_bytes": 1 << 20, **settings}
    return build(EngineSettings(**given), folder, shard)  # type: ignore[arg-type]


def test_the_cache_is_as_large_as_it_may_be(stories260k: Path) -> None:
    """As many whole blocks as `cache_bytes` holds, unless `cache_blocks` says how many."""
    assert built(stories260k).cache.num_blocks == (1 << 20) // (16 * TOKEN_BYTES)
    assert built(stories260k, cache_blocks=7).cache.num_blocks == 7


def test_sequences_are_as_long_as_model_and_cache_allow(stories260k: Path) -> None:
    """The context, or what the cache holds where that is less, or what was asked for."""
    assert built(stories260k).facts.max_model_len == CONTEXT
    assert built(stories260k, cache_blocks=7).facts.max_model_len == 7 * 16
    assert built(stories260k, max_model_len=100).facts.max_model_len == 100


def test_a_cache_too_small_for_one_sequence_is_refused(stories260k: Path) -> None:
    """By name, with what would be right."""
    with pytest.raises(ConfigurationError, match=r"too small for one sequence of max_model_len \(200\).*hold 112"):
        built(stories260k, cache_blocks=7, max_model_len=200)


def test_a_longer_context_than_the_models_is_refused(stories260k: Path) -> None:
    """Its positions end."""
    with pytest.raises(ConfigurationError, match="max_model_len is 513, but the model's context has 512"):
        built(stories260k, max_model_len=513)


@pytest.mark.parametrize(
    ("shard", "why"),
    [
        (Shard(), r"64 tokens takes 2,621,440 bytes; cache_bytes \(1,048,576\) must hold two"),
        (
            Shard(1, 2),
            r"takes 1,310,720 bytes of a rank; cache_bytes \(524,288 of 1,048,576, its share\) must hold two",
        ),
    ],
)
def test_a_cache_of_less_than_two_blocks_is_refused(
    shard: Shard, why: str, stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the size of a block and the room for it, both of one rank: here of a model with wider keys."""
    config = json.loads((stories260k / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 256}))
    monkeypatch.setattr(Shard, "least", lambda shard, number, device: number)  # the other rank is not there to ask
    with pytest.raises(ConfigurationError, match=why):
        built(tmp_path, shard, block_size=64, load_format="dummy", tensor_parallel=shard.count)


def test_keys_and_values_are_kept_as_the_settings_say(stories260k: Path) -> None:
    """Each layer in its format; what that saves is room for more blocks."""
    cache = built(stories260k, kv_cache_dtype="0=auto,-1=int8,fp8_e4m3").cache
    auto, fp8, int8 = KVFormat
    assert [layer.format for layer in cache.layers] == [auto, fp8, fp8, fp8, int8]
    assert cache.block_bytes == 16 * 2 * 4 * (8 * 4 + 4 * (8 + 4))
    assert cache.num_blocks == (1 << 20) // cache.block_bytes
    with pytest.raises(ConfigurationError, match=r"kv_cache_dtype: there are no layers 5\.\.5 in a model of 5"):
        built(stories260k, kv_cache_dtype="5=int8")


@pytest.mark.parametrize("rules", ["fp8", "0-1=int8"])
def test_a_format_that_is_none_stops_the_start(rules: str) -> None:
    """Before anything is loaded, with those that there are."""
    with pytest.raises(ValueError, match="is no KV format: say auto, fp8_e4m3, int8, or LAYERS=FORMAT"):
        EngineSettings(kv_cache_dtype=rules)


@pytest.mark.parametrize("rules", ["int4", "*.down_proj=fp8,", "=fp8"])
def test_a_rule_of_quantization_that_is_none_stops_the_start(rules: str) -> None:
    """Before anything is loaded, with the formats that there are."""
    with pytest.raises(
        ValueError, match="is no rule; it must be one of none, fp8, .*int8.*, or `glob=format` with one of them"
    ):
        EngineSettings(quantization=rules)


def test_rules_are_read_without_torch() -> None:
    """So that a wrong one is told at once, and not after the seconds that torch takes to import."""
    code = "import sys, services.engine.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(stories260k: Path) -> None:
    """And auto takes the CPU then."""
    with pytest.raises(ConfigurationError, match="PyTorch sees no CUDA device"):
        built(stories260k, device="cuda")
    assert built(stories260k, device="auto").facts.device == "cpu"


def test_dtype_and_threads_are_as_the_settings_say(stories260k: Path) -> None:
    """auto is what the config says."""
    assert built(stories260k).model.kv_shape.dtype is torch.float32
    assert built(stories260k, dtype="bfloat16", threads=2).cache.layers[0].kv.dtype is torch.bfloat16
    assert torch.get_num_threads() == 2


def test_dummy_weights_need_no_files(stories260k: Path, tmp_path: Path) -> None:
    """The config is enough."""
    (tmp_path / "config.json").write_bytes((stories260k / "config.json").read_bytes())
    assert built(tmp_path, load_format="dummy").model.vocab_size == 512


def test_what_is_not_said_suits_the_device() -> None:
    """A GPU takes more at a time, in larger blocks; what is said stands on either."""
    assert EngineSettings().capacity("cpu") == Capacity(64, 2048, 32)
    assert EngineSettings().capacity("cuda") == Capacity(256, 8192, 64)
    said = EngineSettings(max_sequences=3, max_step_tokens=100, block_size=16)
    assert said.capacity("cuda") == said.capacity("cpu") == Capacity(3, 100, 16)
