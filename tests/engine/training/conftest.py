"""A toy model, text in files, and a training of a few steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from services.engine.training import __main__ as training

Train = Callable[..., Path]


@pytest.fixture
def toy(tmp_path: Path, stories260k: Path, one_thread: None) -> Path:
    """A folder with the config of a Llama of 2 layers, tied, and the tokenizer of stories260k."""
    folder = tmp_path / "toy"
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    shutil.copy(stories260k / "tokenizer.json", folder)
    return folder


@pytest.fixture
def model(toy: Path) -> torch.nn.Module:
    """With weights that are drawn."""
    torch.manual_seed(0)
    drawn: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(toy))
    return drawn


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of five files, of which some are held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(5):
        lines = [f"Once there was a cat that had {number + line % 7} red balls and went home." for line in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def train(toy: Path, text: Path, tmp_path: Path) -> Train:
    """Runs the command; returns the folder of its result."""

    def run(name: str, *flags: str, status: int = 0) -> Path:
        out = tmp_path / name
        given = " ".join(flags)
        start = () if "--from" in given or "--config" in given else ("--config", str(toy))
        common = ["--text", str(text), "--device", "cpu", "--batch", "4", "--length", "32", "--held-out", "0.1"]
        assert training.main([str(out), *start, *common, "--dtype", "float32", *flags]) == status
        return out

    return run
