"""The layer of experts: how it reads them, and parts of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from holdfast.errors import ConfigurationError
from services.engine.layers.moe import MoE
from services.engine.models.spec import MoESpec
from services.engine.weights import Weights, open_checkpoint

HIDDEN, SIZE, EXPERTS = 8, 6, 5
SPEC = MoESpec(
    num_experts=EXPERTS,
    top_k=3,
    intermediate=SIZE,
    normalize=True,
    layers=frozenset({0}),
    name="mlp",
    expert_names=("gate_proj", "up_proj", "down_proj"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One layer in a checkpoint."""
    content = {"mlp.gate.weight": torch.randn(EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        names = {"gate_proj": (SIZE, HIDDEN), "up_proj": (SIZE, HIDDEN), "down_proj": (HIDDEN, SIZE)}
        content |= {f"mlp.experts.{expert}.{name}.weight": torch.randn(shape) for name, shape in names.items()}
    save_file(content, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("cut", [1, 3])
def test_two_parts_of_a_layer_add_up_to_the_whole(folder: Path, cut: int) -> None:
    """Each reads its own experts alone, so a rank holds and computes no more than its share."""
    x = torch.randn(7, HIDDEN)
    with open_checkpoint(folder, dtype=torch.float32, device=torch.device("cpu")) as checkpoint:
        weights: Weights = checkpoint.under("mlp")
        whole = MoE(weights, SPEC, hidden=HIDDEN)
        checkpoint.finish()
        low, high = MoE(weights, SPEC, hidden=HIDDEN, count=cut), MoE(weights, SPEC, hidden=HIDDEN, first=cut)
    torch.testing.assert_close(low(x) + high(x), whole(x))
    torch.testing.assert_close(low(x, add=high(x)), whole(x))


def test_a_part_reads_no_other_expert(folder: Path) -> None:
    """What lies outside its range is left for whoever has it."""
    with open_checkpoint(folder, dtype=torch.float32, device=torch.device("cpu")) as checkpoint:
        MoE(checkpoint.under("mlp"), SPEC, hidden=HIDDEN, first=1, count=2)
        with pytest.raises(ConfigurationError, match=r"no place for: mlp\.experts\.0\."):
            checkpoint.finish(ignored=["mlp.experts.[34].*"])
        checkpoint.finish(ignored=["mlp.experts.[034].*"])
