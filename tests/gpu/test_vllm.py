"""Checkpoints that `services.engine.quantize` wrote, as vLLM reads them and as the engine does on a CPU; skipped where there is no vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from services.engine.models import load
from services.engine.quantize import __main__ as command
from tests.engine.batches import Bench

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")

ROOT = Path(__file__).parents[2]
LAYERS, VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 2, 512, 256, 4, 2, 64, 512
"""Widths are multiples of 128, which vLLM's kernels for few bits and for blocks of fp8 ask for."""
IDS = torch.randint(3, VOCABULARY, (256,), generator=torch.Generator().manual_seed(1)).tolist()
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights in bfloat16, whose layers give about as much as they are given."""
    draw, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("plain")

    def matrix(outputs: int, inputs: int, *, std: float | None = None) -> Tensor:
        return (torch.randn(outputs, inputs, generator=draw) * (std or inputs**-0.5)).bfloat16()

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, std=1.0),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, std=0.1),
    }
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    for index in range(LAYERS):
        prefix = f"model.layers.{index}"
        tensors |= {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ours(folder: Path, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the tokens but the first, by the engine on a CPU."""
    with torch.inference_mode():
        logits = Bench(load(folder, dtype=dtype)).logits(IDS)
    return logits.float().log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def theirs(folder: Path, out: Path) -> Tensor:
    """The same by vLLM, in bfloat16."""
    words = [sys.executable, "-m", "tests.gpu.forced_by_vllm", str(folder), str(out)]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        input=json.dumps(IDS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return torch.tensor(json.loads(out.read_text()))


def mean_distance(some: Tensor, others: Tensor) -> float:
    return float((some - others).abs().mean())


@pytest.mark.parametrize(
    "scheme",
    [
        "int8",
        "int8-weight",
        "int4-g64",
        "int4-g128",
        "int4-g64-asym",
        "fp8",
        "fp8-block",
        "*.self_attn.*=int8-weight,*.mlp.*=int4-g64",
    ],
)
def test_vllm_predicts_the_same(scheme: str, plain: Path, tmp_path: Path) -> None:
    """No further from float32 than twice the engine's own bfloat16, which changes which way activations are rounded; and four bits
    much nearer than the plain model is, from which they are 20 times as far as bfloat16 from float32."""
    out = tmp_path / "out"
    command.main([str(plain), str(out), "--scheme", scheme])
    truth = ours(out, torch.float32)
    found = theirs(out, tmp_path / "found.json")
    assert mean_distance(found, truth) < 2 * mean_distance(ours(out, torch.bfloat16), truth)
    if "int4" in scheme:
        assert mean_distance(found, truth) < mean_distance(ours(plain, torch.float32), truth) / 4
