"""The angles of every rope type against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from services.engine.layers.rotary import Rotary
from services.engine.models.spec import ModelSpec

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 4096,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn without truncation": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 1024,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_angles_are_those_of_transformers(name: str) -> None:
    """Cosine and sine at near and far positions agree within float32's rounding of the angle."""
    config = transformers.LlamaConfig(**COMMON, rope_parameters=dict(ROPES[name]))
    positions = torch.tensor([0, 1, 17, 511, 1024, 4095])
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = (x[0] for x in rotary(torch.zeros(1), positions[None]))
    spec = ModelSpec.from_config(COMMON | {"rope_parameters": ROPES[name]}).rotary
    angles = Rotary(spec, device=torch.device("cpu"))(positions)
    sign = torch.cat((-torch.ones(16), torch.ones(16)))
    torch.testing.assert_close(angles.cos_N1D[:, 0], cos, rtol=0, atol=1e-3)
    torch.testing.assert_close(angles.sin_N1D[:, 0] * sign, sin, rtol=0, atol=1e-3)
    torch.testing.assert_close(angles.cos_N1D[:3, 0], cos[:3], rtol=0, atol=5e-6)
