"""The kernels that choose tokens."""

from __future__ import annotations

import math

import pytest
import torch

from services.engine.ops import sampling as specified
from services.engine.ops.kernels import sampling

# The logarithm of a group without probability is minus infinity, as it should be; NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

VOCAB = 5000


def test_tokens_are_those_of_the_specification() -> None:
    """Greedy rows and drawn ones, by their slots' parameters, written to their slots' positions."""
    logits = 3 * torch.randn(6, VOCAB)
    slots, positions = torch.tensor([4, 0, 3, 5, 1, 2]), torch.tensor([5, 6, 7, 1000, 9, 10])
    floats, integers = torch.zeros(7, 3), torch.randint(0, 1 << 32, (7, 4))
    integers[:, 3] = torch.arange(7)
    floats[:, 0] = torch.tensor([0, 1, 0.7, 1.3, 0, 1, 0])
    tokens = torch.zeros(7, 1001, dtype=torch.int32)
    token_ids, peaks = sampling.sample(logits, floats, integers, slots, positions, tokens)
    temperature = floats[slots, 0]
    drawn = temperature > 0
    expected = logits.argmax(-1)
    chosen = integers[slots][drawn]
    p = specified.probabilities(logits[drawn].clone(), temperature[drawn])
    expected[drawn] = specified.draw(p, seed_R2=chosen[:, 1:3], position_R=positions[drawn], choice_R=chosen[:, 3])
    assert torch.equal(token_ids, expected)
    assert torch.equal(peaks, logits.amax(-1))
    assert torch.equal(tokens[slots, positions].long(), expected)
    assert torch.count_nonzero(tokens) == torch.count_nonzero(expected)


def test_the_first_among_equals_is_taken() -> None:
    """Also where the others stand in other parts of the vocabulary."""
    logits = torch.zeros(1, VOCAB)
    logits[0, [70, 71, 4000]] = 1.0
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    token_ids, _ = sampling.sample(
        logits, torch.zeros(1, 3), zeros, zeros[0, :1], zeros[0, :1], torch.zeros(1, 1, dtype=torch.int32)
    )
    assert token_ids.tolist() == [70]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_show(temperature: float) -> None:
    """The row's peak is no finite number, its token one of the vocabulary; other rows do not notice."""
    logits = torch.zeros(3, VOCAB)
    logits[0, 3000], logits[1], logits[2, 8] = math.nan, -math.inf, 1000.0
    zeros = torch.zeros(3, 4, dtype=torch.int64)
    floats = torch.tensor([[temperature, 1, 0]] * 3)
    token_ids, peaks = sampling.sample(
        logits, floats, zeros, torch.arange(3), zeros[:, 0], torch.zeros(3, 1, dtype=torch.int32)
    )
    assert not peaks[:2].isfinite().any() and peaks[2] == 1000.0
    assert all(0 <= token < VOCAB for token in token_ids.tolist()) and token_ids[2] == 8
