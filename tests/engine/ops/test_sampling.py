"""The steps of sampling, each alone, against published vectors, plain float64 and transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.engine.ops import sampling

# Random123, kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers_in_numpy_and_torch(counter: str, key: str, output: str) -> None:
    """Both ways of computing it agree with Random123's known answers."""
    in_numpy = [np.array([word]) for word in words(counter) + words(key)]
    in_torch = [torch.tensor([word]) for word in words(counter) + words(key)]
    answers = [
        sampling.philox(tuple(each[:4]), tuple(each[4:]))  # type: ignore[arg-type, type-var]
        for each in (in_numpy, in_torch)
    ]
    assert [[int(word[0]) for word in answer] for answer in answers] == [words(output)] * 2


def noise(count: int, *, seed: int = 1, position: int = 0, choice: int = 0, series: int = 0) -> Tensor:
    parts = sampling.gumbel(
        (4,) * series + (count,),
        seed_R2=torch.tensor([[seed & 0xFFFFFFFF, seed >> 32]]),
        position_R=torch.tensor([position]),
        choice_R=torch.tensor([choice]),
    )
    return parts[-1][0]


def test_noise_is_where_the_counter_says() -> None:
    """Number i of series s is lane i & 3 at counter (i >> 2, position, choice, s), its upper 23 bits made Gumbel."""
    seed, position, choice, number = 0x0123456789ABCDEF, 77, 3, 14
    counter = [np.array([word]) for word in (number >> 2, position, choice, 1)]
    key = [np.array([word]) for word in (seed & 0xFFFFFFFF, seed >> 32)]
    word = int(sampling.philox(tuple(counter), tuple(key))[number & 3][0])  # type: ignore[arg-type, type-var]
    expected = -math.log(-math.log(((word >> 9) + 0.5) / 2**23))
    found = noise(20, seed=seed, position=position, choice=choice, series=1)[number]
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_noise_depends_on_every_part_of_its_name() -> None:
    """Another seed in either half, position, choice or series gives other noise."""
    base = noise(64)
    others = [
        noise(64, seed=2), noise(64, seed=1 + (1 << 32)), noise(64, position=1), noise(64, choice=1), noise(64, series=1),
    ]  # fmt: skip
    assert all(not torch.isclose(base, other).any() for other in others)


def test_noise_is_standard_gumbel() -> None:
    """Its mean is Euler's constant, its variance π²/6, and it is bounded as promised."""
    values = torch.cat([noise(4096, position=position) for position in range(64)]).double()
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert values.min().item() > -2.82
    assert values.max().item() < 16.64


def draws(p_V: Tensor, count: int, *, seed: int = 5) -> Tensor:
    """Tokens drawn from one distribution at `count` positions."""
    return sampling.draw(
        p_V.expand(count, -1).contiguous(),
        seed_R2=torch.tensor([[seed & 0xFFFFFFFF, seed >> 32]]).expand(count, -1),
        position_R=torch.arange(count),
        choice_R=torch.zeros(count, dtype=torch.int64),
    )


def chi_square(counts: Tensor, p_V: Tensor) -> float:
    """In standard deviations above what is expected; tokens that are expected less than eight times count as one."""
    expected = p_V.double() * counts.sum()
    often = expected >= 8
    observed = torch.cat((counts[often].double(), counts[~often].sum().double()[None]))
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    degrees = len(wanted) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocabulary", [7, 128, 300, 1000])
def test_draws_have_the_distribution(vocabulary: int) -> None:
    """Over many positions the tokens drawn pass a chi-square test, whole groups or not."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 1.5
    p_V = logits.softmax(-1)
    counts = torch.bincount(draws(p_V, 40_000), minlength=vocabulary)
    assert len(counts) == vocabulary
    assert chi_square(counts, p_V) < 4


def test_the_chi_square_test_would_notice() -> None:
    """The same draws fail it against a slightly warmer distribution."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(300)) * 1.5
    counts = torch.bincount(draws(logits.softmax(-1), 40_000), minlength=300)
    assert chi_square(counts, (logits / 1.1).softmax(-1)) > 4


def test_consecutive_draws_are_independent() -> None:
    """Pairs of tokens at neighbouring positions have the product of their distributions."""
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens = draws(p_V, 40_001)
    pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16)
    assert chi_square(pairs, torch.outer(p_V, p_V).flatten()) < 4


def test_what_has_no_probability_is_never_drawn() -> None:
    """Dropped tokens stay dropped, whole groups of them included, and sums need not be one."""
    p_V = torch.zeros(700)
    p_V[[3, 131, 699]] = torch.tensor([1.0, 2.0, 1.0]) * 1e-3
    assert set(draws(p_V, 500).tolist()) == {3, 131, 699}


def rows_of_logits(count: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn((count, vocabulary), generator=torch.Generator().manual_seed(seed)) * scale


def kept_by_transformers(warper: object, logits_RV: Tensor) -> Tensor:
    return warper(torch.zeros((len(logits_RV), 1), dtype=torch.int64), logits_RV.clone()) > -torch.inf  # type: ignore[operator]


def kept_by_float64(logits_V: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """What stays of one row, by the book: sorted, in order, in float64."""
    order = logits_V.double().argsort(descending=True).tolist()
    p = logits_V.double().softmax(-1)
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(p[token].item() for token in order), [], 0.0
    for token in order:
        if mass < top_p * total:
            kept.append(token)
        mass += p[token].item()
    return {token for token in kept if p[token] >= min_p * p.max()}


@pytest.mark.parametrize("vocabulary", [50, 1000, 20_000])
@pytest.mark.parametrize("top_k", [1, 5, 64, 1000])
def test_top_k_keeps_what_transformers_keeps(vocabulary: int, top_k: int) -> None:
    """Any k, larger than the vocabulary too."""
    logits_RV = rows_of_logits(4, vocabulary)
    p_RV = sampling.keep_top_k(logits_RV.softmax(-1), torch.full((4,), top_k), most=top_k)
    assert torch.equal(p_RV > 0, kept_by_transformers(TopKLogitsWarper(top_k), logits_RV))


@pytest.mark.parametrize("vocabulary", [50, 1000, 20_000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99])
def test_top_p_keeps_what_transformers_keeps(vocabulary: int, top_p: float) -> None:
    """Narrow and wide nuclei, the likeliest token always."""
    logits_RV = rows_of_logits(4, vocabulary)
    p_RV = sampling.keep_top_p(logits_RV.softmax(-1), torch.full((4,), top_p))
    assert torch.equal(p_RV > 0, kept_by_transformers(TopPLogitsWarper(top_p), logits_RV))


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    """The likeliest token always."""
    logits_RV = rows_of_logits(4, 1000)
    p_RV = sampling.keep_min_p(logits_RV.softmax(-1), torch.full((4,), min_p))
    assert torch.equal(p_RV > 0, kept_by_transformers(MinPLogitsWarper(min_p), logits_RV))


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 400),
    rows=st.lists(
        st.tuples(st.integers(0, 500), st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]), st.sampled_from([0.0, 0.02, 0.3])),
        min_size=1,
        max_size=5,
    ),
)
def test_what_stays_is_what_float64_says_in_every_row(
    seed: int, vocabulary: int, rows: list[tuple[int, float, float]]
) -> None:
    """Rows with different parameters in one batch, off in some, each keep their own tokens."""
    logits_RV = rows_of_logits(len(rows), vocabulary, seed=seed)
    top_k_R, top_p_R, min_p_R = torch.tensor([row[0] for row in rows]), *(
        torch.tensor([row[index] for row in rows]) for index in (1, 2)
    )  # fmt: skip
    p_RV = logits_RV.softmax(-1)
    sampling.keep_top_k(p_RV, top_k_R, most=max(row[0] for row in rows) or 1)
    sampling.keep_top_p(p_RV, top_p_R)
    sampling.keep_min_p(p_RV, min_p_R)
    for p_V, logits_V, (top_k, top_p, min_p) in zip(p_RV, logits_RV, rows, strict=True):
        expected = kept_by_float64(logits_V, top_k=top_k, top_p=float(np.float32(top_p)), min_p=min_p)
        assert set(p_V.nonzero()[:, 0].tolist()) == expected


def test_equals_at_the_border_stay_together() -> None:
    """Tokens as likely as the last one kept are kept, for nothing tells them apart."""
    p_RV = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    assert sampling.keep_top_k(p_RV.clone(), torch.tensor([2]), most=2).count_nonzero() == 4
    assert sampling.keep_top_p(p_RV.clone(), torch.tensor([0.5])).count_nonzero() == 4
    assert sampling.keep_top_p(p_RV.clone(), torch.tensor([0.4])).count_nonzero() == 1
    assert sampling.keep_min_p(p_RV.clone(), torch.tensor([0.5])).count_nonzero() == 4


def test_the_sorted_form_of_top_p_agrees_with_the_fast_one() -> None:
    """What other devices run keeps the same tokens as what a CPU runs."""
    p_RV = rows_of_logits(8, 5000).softmax(-1)
    top_p_R = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.95, 0.99, 0.999, 1.0])
    floors = sampling.nucleus_floors(p_RV, top_p_R)
    fast = sampling.keep_top_p(p_RV.clone(), top_p_R)
    assert torch.equal(fast > 0, p_RV >= floors[:, None])


def test_temperature_is_transformers_temperature() -> None:
    """The logits are divided by it before the softmax; without one they stay."""
    logits_RV = rows_of_logits(3, 500)
    warmed = TemperatureLogitsWarper(0.7)(torch.zeros((3, 1)), logits_RV.clone())
    found = sampling.probabilities(logits_RV.clone(), torch.full((3,), 0.7))
    torch.testing.assert_close(found, warmed.softmax(-1))
    torch.testing.assert_close(sampling.probabilities(logits_RV.clone()), logits_RV.softmax(-1))


def penalized(logits_V: Tensor, history: list[int], num_prompt: int, **penalties: float) -> Tensor:
    found = logits_V.clone()
    both = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, **penalties}
    sampling.penalize(found, torch.tensor(history, dtype=torch.int32), num_prompt=num_prompt, **both)
    return found


HISTORY = [5, 9, 5, 3, 9, 9, 9, 0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    """Prompt and output count, each token once."""
    logits_V = rows_of_logits(1, 20)[0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([HISTORY]), logits_V[None].clone())[0]
    torch.testing.assert_close(penalized(logits_V, HISTORY, 3, repetition=penalty), expected)


def test_presence_and_frequency_count_the_output_alone() -> None:
    """Presence is subtracted once, frequency for each occurrence; the prompt [5, 9, 5] counts for nothing."""
    logits_V = rows_of_logits(1, 20)[0]
    expected = logits_V.clone()
    for token, times in {3: 1, 9: 3, 0: 1}.items():
        expected[token] -= 0.5 + 0.25 * times
    torch.testing.assert_close(penalized(logits_V, HISTORY, 3, presence=0.5, frequency=0.25), expected)


def test_penalties_apply_in_their_order() -> None:
    """Repetition divides what the others then subtract from."""
    found = penalized(torch.full((4,), 8.0), [2], 0, repetition=2.0, presence=1.0, frequency=0.5)
    assert found.tolist() == [8.0, 8.0, 2.5, 8.0]


def test_argmax_takes_the_lowest_of_equals() -> None:
    """Ties are broken by id, in long rows too."""
    logits_RV = torch.zeros((2, 50_000))
    logits_RV[0, [49_999, 7, 30_000]] = 5.0
    ids_R, values_R = sampling.argmax(logits_RV)
    assert (ids_R.tolist(), values_R.tolist()) == ([7, 0], [5.0, 0.0])


@given(seed=st.integers(0, 10**6), columns=st.integers(1, 3000), count=st.integers(0, 40))
def test_likeliest_finds_what_sorting_finds(seed: int, columns: int, count: int) -> None:
    """Its shortcut over runs of columns is exact, the shorter last run included."""
    x_RV = rows_of_logits(3, columns, seed=seed)
    values, ids = sampling.likeliest(x_RV, min(count, columns))
    assert torch.equal(values, x_RV.sort(-1, descending=True).values[:, : min(count, columns)])
    assert torch.equal(x_RV.gather(1, ids), values)


def test_log_probabilities_are_those_of_log_softmax() -> None:
    """Of the chosen tokens and of the likeliest ones."""
    logits_RV = rows_of_logits(5, 3000)
    chosen_R = torch.tensor([0, 17, 2999, 1000, 5])
    chosen, top, ids = sampling.log_probabilities(logits_RV, chosen_R, most=7)
    expected = logits_RV.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected.gather(1, chosen_R[:, None])[:, 0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(top.double(), expected.topk(7, -1).values, atol=1e-5, rtol=1e-6)
    assert torch.equal(ids, expected.topk(7, -1).indices)
