"""How far bfloat16 is off, beside transformers in bfloat16, on the real shape of Qwen3-0.6B. Some 30 seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from services.engine import models
from services.engine.batch import Admission, Growth, Step, Work
from services.engine.kv_cache import KVCache
from services.engine.sequence import SamplingParams, StopRules
from services.engine.state import DeviceState

NUM_TOKENS, DECODED, BLOCK_SIZE = 300, 12, 64
"""The last of the tokens are computed one by one."""


def save(shape: Path, folder: Path, device: str) -> None:
    """A model of random weights, in bfloat16; smaller where a CPU only proves this test."""
    config = transformers.AutoConfig.from_pretrained(shape)
    if device == "cpu":
        config.num_hidden_layers, config.layer_types, config.vocab_size = 2, config.layer_types[:2], 1000
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)


@torch.inference_mode()
def theirs(folder: Path, token_ids: list[int], *, dtype: torch.dtype, device: str) -> Tensor:
    """The logits of transformers, eager."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    logits: Tensor = model.to(device).eval()(torch.tensor([token_ids], device=device), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def ours(folder: Path, token_ids: list[int], *, device: str, invariant: bool) -> Tensor:
    """The engine's logits: of a prompt, and then token by token."""
    model = models.load(folder, dtype=torch.bfloat16, device=device, invariant=invariant)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    cache = KVCache(model.kv_shape, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=device)
    state = DeviceState(num_slots=1, max_len=len(token_ids) + 1, block_size=BLOCK_SIZE, device=torch.device(device))
    admission = Admission(
        0, token_ids, num_prompt=len(token_ids), choice=0, sampling=SamplingParams(), stop=StopRules(1)
    )
    prompt = len(token_ids) - DECODED
    steps = [
        Step(1, (Work(0, 0, prompt, True),), (admission,), (Growth(0, 0, tuple(range(num_blocks))),)),
        *(Step(2 + at - prompt, (Work(0, at, 1, True),)) for at in range(prompt, len(token_ids))),
    ]
    return torch.cat([model.forward(replace(state.apply(step), sample_rows_R=None), cache).clone() for step in steps])


@pytest.mark.parametrize("invariant", [False, True], ids=["ordinary", "deterministic"])
def test_logits_are_off_as_little_as_those_of_transformers(
    shared: Path, tmp_path: Path, device: str, quiet: None, invariant: bool
) -> None:
    """Prompt and decodes: at most 1.2 times the error of transformers in bfloat16, against transformers in float32."""
    save(shared / "data" / "configs" / "Qwen3-0.6B", tmp_path, device)
    token_ids = torch.randint(10, 990, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = theirs(tmp_path, token_ids, dtype=torch.float32, device=device)
    error_of_theirs = (theirs(tmp_path, token_ids, dtype=torch.bfloat16, device=device) - exact).pow(2).mean().sqrt()
    off = (ours(tmp_path, token_ids, device=device, invariant=invariant and device == "cuda") - exact).pow(2)
    error = off.mean().sqrt()
    print(f"error of ours {error:.5f}, of transformers {error_of_theirs:.5f}, logits {exact.std():.3f}")
    assert 0 < error <= 1.2 * error_of_theirs
    assert off[-DECODED:].mean().sqrt() <= 1.5 * error_of_theirs
