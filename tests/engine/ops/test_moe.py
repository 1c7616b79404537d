"""Routing and mixing of experts."""

from __future__ import annotations

import pytest
import torch

from services.engine.ops.moe import mix, route


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
    """Each expert sees its own tokens alone, once, and those that nobody goes to are not run."""
    seen: list[tuple[int, int]] = []

    def expert(index: int) -> object:
        def answer(x: torch.Tensor) -> torch.Tensor:
            seen.append((index, len(x)))
            return x * (index + 1)

        return answer

    x = torch.arange(1, 9, dtype=dtype).view(4, 2)
    experts = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.5, 0.25]])
    out = mix(x, weights, experts, [expert(index) for index in range(5)])
    factors = (weights * (experts + 1)).sum(-1, keepdim=True)
    torch.testing.assert_close(out, (x.float() * factors).to(dtype))
    assert seen == [(0, 3), (1, 2), (3, 3)]
