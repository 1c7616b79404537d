"""Routing and mixing of experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.moe import Experts, mix, route


def test_the_likeliest_experts_are_chosen_with_their_probabilities() -> None:
    """Weights are the softmax over all experts, and add up to one only if they are made to."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 5.5, 0.0]])
    probabilities = logits.softmax(-1)
    weights, experts = route(logits, top_k=2, normalize=False)
    assert experts.tolist() == [[1, 3], [2, 0]]
    torch.testing.assert_close(weights, probabilities.gather(1, experts))
    normal, _ = route(logits, top_k=2, normalize=True)
    torch.testing.assert_close(normal.sum(-1), torch.ones(2))
    torch.testing.assert_close(normal[:, 0] / normal[:, 1], weights[:, 0] / weights[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_weighted_sum_of_its_experts(dtype: torch.dtype) -> None:
    """As its definition gives it in float64, where one expert has most tokens and another none."""
    x, gate_up, down = drawn(dtype)
    experts_NA = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0]])
    weights_NA = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.5, 0.25]])
    expected = definition(x, weights_NA, experts_NA, gate_up, down)
    error = 1e-5 if dtype is torch.float32 else 2e-2
    out = mix(x, weights_NA, experts_NA, Experts.of(gate_up, down))
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, atol=error, rtol=error)
    add = torch.randn_like(x)
    expected += add.double()
    out = mix(x, weights_NA, experts_NA, Experts.of(gate_up, down), add=add)
    torch.testing.assert_close(out.double(), expected, atol=error, rtol=error)


def test_an_expert_that_nobody_goes_to_is_not_run() -> None:
    """So the matrices of one may hold anything."""
    x, gate_up, down = drawn(torch.float32)
    gate_up[2], down[2] = torch.nan, torch.nan
    out = mix(x, torch.ones(4, 1), torch.tensor([[0], [1], [4], [3]]), Experts.of(gate_up, down))
    assert out.isfinite().all()


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_parts_of_the_experts_add_up_to_the_whole(cut: int) -> None:
    """Each part answers for its own experts alone, wherever the cut is."""
    x, gate_up, down = drawn(torch.float32)
    weights_NA, experts_NA = route(torch.randn(4, 5), top_k=2, normalize=True)
    whole = mix(x, weights_NA, experts_NA, Experts.of(gate_up, down))
    low, high = Experts.of(gate_up[:cut], down[:cut]), Experts.of(gate_up[cut:], down[cut:], first=cut)
    parts = [mix(x, weights_NA, experts_NA, part) for part in (low, high)]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Four tokens of eight features, and five experts of six."""
    draw = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(shape, generator=draw) for shape in ((4, 8), (5, 12, 8), (5, 8, 6)))
    return x.to(dtype), (gate_up * 0.3).to(dtype), (down * 0.3).to(dtype)


def definition(x: Tensor, weights_NA: Tensor, experts_NA: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A token after the other, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (weights, experts) in enumerate(zip(weights_NA, experts_NA, strict=True)):
        for weight, expert in zip(weights.double(), experts, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight * (down[expert].double() @ (F.silu(gate) * up))
    return out
