"""Small models of every native family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.test_models import NATIVE, SMALL

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def config_of(folder: Path, name: str) -> Path:
    """A folder with the config of a family, by its name in `NATIVE`, and nothing else."""
    family = name.split()[0]
    config = transformers.AutoConfig.for_model(family, **SMALL | NATIVE[name], architectures=[ARCHITECTURES[family]])
    config.save_pretrained(folder)
    return folder


def saved(folder: Path, name: str, **changes: Any) -> Path:
    """A checkpoint of a family as transformers writes it, with weights far enough from zero that logits have clear maxima."""
    family = name.split()[0]
    config = transformers.AutoConfig.for_model(family, **SMALL | NATIVE[name] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
    model.save_pretrained(folder)
    return folder
