"""The tilings that `benchmarks.kernels --tune` tries: each computes what the specification does."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.kernels import shape as shapes
from benchmarks.kernels import tuning
from benchmarks.kernels.costs import Load
from services.engine.models.spec import ModelSpec

# Triton's interpreter takes the number out of an array of one.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

LEFT_OUT = {f"{name} {form}" for name in ("qkv", "o", "gate_up") for form in ("w8a8", "w4a16")}
"""What the like of `down` stands for."""

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 2,
}


def test_every_tiling_that_is_tried_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, experts and both kinds of attention, in float16, which the interpreter can multiply; torch alone has no fp8
    for a CPU."""
    monkeypatch.setattr(shapes, "DTYPE", torch.float16)
    monkeypatch.setattr(tuning, "seconds_a_call", lambda calls, device: 1.0)
    shape = shapes.Shape(ModelSpec.from_config(CONFIG), torch.device("cpu"))
    found = {
        (search.name, str(search.load)): tuning.explore(search, shape.device, until=time.monotonic() + 100)
        for search in tuning.searches(shape, [Load.decode(2, 20), Load.prefill(18)])
        if search.name not in LEFT_OUT
    }
    kinds = ("attention auto", "attention int8", "experts", "qkv bf16", "qkv fp8", "down w8a8", "down w4a16")
    assert {name for name, _ in found} >= set(kinds)
    for (name, _), each in found.items():
        assert len(each.seconds) >= 5, f"{name}: {each}"
        assert set(each.refused) <= {"cuBLAS"}, f"{name}: {each}"


@pytest.mark.parametrize("form", ["w8a8", "fp8"])
def test_every_tiling_of_many_rows_is_right(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix in eight bits; but torch's own kernel for fp8, which a CPU lacks."""
    monkeypatch.setattr(tuning, "seconds_a_call", lambda calls, device: 1.0)
    shape = shapes.Shape(ModelSpec.from_config(CONFIG), torch.device("cpu"))
    (search,) = tuning.product_searches(shape, [Load.prefill(300)], "o", 128, 128, form)
    found = tuning.explore(search, shape.device, until=time.monotonic() + 100)
    assert len(found.seconds) >= 15 and "skinny" in found.seconds
    assert set(found.refused) <= {"cuBLAS"}, found.refused
