"""From features to logits."""

from __future__ import annotations

import pytest
import torch

from services.engine.layers.head import Head
from services.engine.layers.linear import Linear
from services.engine.quant.unquantized import Unquantized
from services.engine.shard import ALONE, Part

VOCABULARY, FEATURES, ROWS = 4096, 64, 256


def random_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and rows of features whose products are about as large as real logits."""
    random = torch.Generator().manual_seed(0)
    weight_VI = torch.randn(VOCABULARY, FEATURES, generator=random).to(dtype)
    return weight_VI, torch.randn(ROWS, FEATURES, generator=random).to(dtype)


def head(linear: Linear, weight_VI: torch.Tensor) -> Head:
    """One of the whole vocabulary."""
    return Head(linear, weight_VI, part=Part(0, len(weight_VI), len(weight_VI)), shard=ALONE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_best_token_is_that_of_float32(dtype: torch.dtype) -> None:
    """Where 16 bits alone would often name another: logits that differ by less than a step of the format tie."""
    weight_VI, x_RI = random_case(dtype)
    linear = Linear(weight_VI, format=Unquantized())
    exact_RV = x_RI.float() @ weight_VI.float().T
    logits_RV = head(linear, weight_VI)(x_RI)
    assert logits_RV.dtype is torch.float32
    assert torch.equal(logits_RV.argmax(1), exact_RV.argmax(1))
    torch.testing.assert_close(logits_RV.max(1).values, exact_RV.max(1).values)
    torch.testing.assert_close(logits_RV, exact_RV, rtol=0.01, atol=0.1)
    if dtype is torch.bfloat16:
        assert not torch.equal(linear(x_RI).float().argmax(1), exact_RV.argmax(1))


def test_float32_needs_no_second_look() -> None:
    """The products as they are."""
    weight_VI, x_RI = random_case(torch.float32)
    linear = Linear(weight_VI, format=Unquantized())
    assert torch.equal(head(linear, weight_VI)(x_RI), linear(x_RI))


def test_a_vocabulary_may_be_smaller_than_the_candidates() -> None:
    """Then all are computed again."""
    weight_VI, x_RI = torch.randn(3, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    logits_RV = head(Linear(weight_VI, format=Unquantized()), weight_VI)(x_RI)
    torch.testing.assert_close(logits_RV, x_RI.float() @ weight_VI.float().T)
