"""What weights take in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from services.engine.models import load
from services.engine.quality.sizes import bytes_of, num_weights

FREQUENCIES = 4 * 4
"""Of the rotary embedding: a head has 8 features."""


def test_every_number_of_a_model_is_counted_once(stories260k: Path) -> None:
    """A head that is the embedding's matrix is no other one, in the file as in memory."""
    tensors = load_file(stories260k / "model.safetensors")
    assert num_weights(stories260k) == sum(each.numel() for name, each in tensors.items() if name != "lm_head.weight")
    assert bytes_of(load(stories260k)) == 4 * num_weights(stories260k) + FREQUENCIES


def test_scales_count(stories260k: Path) -> None:
    """A CPU keeps values of fp8 as wide as they were, and a scale for each output besides: nothing is saved there."""
    outputs = 5 * (64 + 2 * 32 + 64 + 2 * 172 + 64)
    assert bytes_of(load(stories260k, quantization="fp8")) - bytes_of(load(stories260k)) == 4 * outputs


def test_packed_layouts_count_and_views_do_not() -> None:
    """A matrix of oneDNN has no address, and still takes its bytes."""
    matrix = torch.randn(32, 16)
    assert bytes_of([matrix, matrix.t(), matrix.view(-1)]) == 32 * 16 * 4
    assert bytes_of((matrix, {"packed": matrix.to_mkldnn()})) == 2 * 32 * 16 * 4
