"""The sampler as a whole: what a batch of sequences with all kinds of wishes gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor

from services.engine.sampler import TorchSampler
from services.engine.sequence import FinishReason, Sequence, StopRules
from tests.engine.slots import WISHES, admitted, sample, sequence, tokens

VOCABULARY = 600


def logits(count: int, *, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randn((count, vocabulary), generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_rows_take_the_likeliest_and_the_lowest_of_equals() -> None:
    """Whatever else the batch holds."""
    logits_RV = logits(3)
    logits_RV[0, [500, 40]] = 50.0
    assert tokens(logits_RV, *[sequence()] * 3) == [40, *logits_RV[1:].argmax(-1).tolist()]
    mixed = tokens(logits_RV, sequence(), sequence(temperature=1.0), sequence())
    assert mixed[0] == 40
    assert mixed[2] == logits_RV[2].argmax()


def test_a_temperature_too_low_to_divide_by_is_greedy() -> None:
    """The logits would leave float32."""
    logits_RV = logits(1) * 100
    assert tokens(logits_RV, sequence(temperature=1e-30)) == logits_RV.argmax(-1).tolist()
    assert tokens(logits_RV, sequence(temperature=1e-5)) == logits_RV.argmax(-1).tolist()


@st.composite
def wishing(draw: st.DrawFn) -> Sequence:
    ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
    return sequence(draw(ids) or [1], draw(ids), **draw(st.sampled_from(WISHES)))


@given(rows=st.lists(wishing(), min_size=1, max_size=8), seed=st.integers(0, 1000), order=st.randoms())
def test_a_token_depends_neither_on_the_batch_nor_on_the_row(rows: list[Sequence], seed: int, order: Any) -> None:
    """Alone, together, and in another order every sequence gets the same token."""
    logits_RV = logits(len(rows), seed=seed)
    together = tokens(logits_RV, *rows)
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    assert tokens(logits_RV[shuffled], *[rows[row] for row in shuffled]) == [together[row] for row in shuffled]
    assert [tokens(logits_RV[row : row + 1], each)[0] for row, each in enumerate(rows)] == together


def test_a_token_depends_on_seed_position_and_choice() -> None:
    """Two of sixty equal rows with other noise rarely agree; the same noise gives the same token."""
    logits_RV = torch.zeros((1, VOCABULARY))

    def drawn(**fields: Any) -> list[int]:
        return [tokens(logits_RV, sequence([1] * length, temperature=1.0, **fields))[0] for length in range(1, 61)]

    base, others = drawn(seed=4), [drawn(seed=5), drawn(seed=4 + 2**32), drawn(seed=4, choice=1)]
    assert drawn(seed=4) == base
    assert len(set(base)) > 50
    assert all(sum(a == b for a, b in zip(base, other, strict=True)) < 5 for other in others)


def test_a_token_stands_at_its_position_whether_its_past_is_prompt_or_output() -> None:
    """A sequence that is taken up by another engine goes on with the same noise."""
    logits_RV = logits(1)
    split = [sequence([1] * count, [1] * (40 - count), temperature=1.0, seed=8) for count in (40, 25, 1)]
    assert len({tokens(logits_RV, each)[0] for each in split}) == 1


def test_a_batch_of_drawn_rows_has_the_distribution_after_all_steps() -> None:
    """Temperature, top-k and top-p together: 4,000 rows, each kept token about as often as its share."""
    logits_V = logits(1, vocabulary=50)[0]
    rows = [sequence(temperature=0.8, top_k=10, top_p=0.9, seed=seed) for seed in range(4000)]
    counts = torch.bincount(torch.tensor(tokens(logits_V.expand(4000, -1), *rows)), minlength=50)
    p_V = (logits_V / 0.8).softmax(-1)
    top = p_V.topk(10)
    kept = (top.values.cumsum(0) - top.values) < 0.9 * top.values.sum()
    shares = torch.zeros(50).index_copy(0, top.indices[kept], top.values[kept] / top.values[kept].sum())
    assert set(counts.nonzero()[:, 0].tolist()) <= set(top.indices[kept].tolist())
    torch.testing.assert_close(counts / 4000, shares, atol=0.03, rtol=0)


def test_penalties_and_bias_come_before_the_truncation() -> None:
    """What top-k keeps is the likeliest token after them."""
    logits_RV = torch.zeros((1, VOCABULARY))
    logits_RV[0, [10, 20]] = torch.tensor([8.0, 7.0])
    assert tokens(logits_RV, sequence(temperature=1.0, top_k=1)) == [10]
    assert tokens(logits_RV, sequence([10], temperature=1.0, top_k=1, repetition_penalty=2.0)) == [20]
    assert tokens(logits_RV, sequence([1], [10], temperature=1.0, top_k=1, frequency_penalty=1.5)) == [20]
    assert tokens(logits_RV, sequence([10], [1], temperature=1.0, top_k=1, presence_penalty=1.5)) == [10]
    assert tokens(logits_RV, sequence(temperature=1.0, top_k=1, logit_bias=((33, 9.0),))) == [33]


def test_penalties_read_the_tokens_known_to_the_slot() -> None:
    """A token that the sampler wrote is penalized in the next step, though the host's sequence lacks it."""
    state, selection = admitted(sequence([1, 2], frequency_penalty=2.0))
    logits_RV = torch.zeros((1, VOCABULARY))
    logits_RV[0, [10, 20]] = torch.tensor([8.0, 7.0])
    state.append(selection, torch.tensor([10]))
    later = type(selection)([0], [3], selection.slots_R, selection.positions_R + 1)
    assert TorchSampler(state)(logits_RV, later).token_ids_R.tolist() == [20]


@pytest.mark.parametrize("num_output", [0, 1, 2, 3])
def test_stop_tokens_are_masked_until_min_tokens_as_in_transformers(num_output: int) -> None:
    """Those before the one that makes the sequence `min_tokens` long; all stop tokens of the sequence."""
    logits_RV = logits(1)
    logits_RV[0, [3, 4]] = torch.tensor([90.0, 80.0])
    rules = StopRules(100, min_tokens=3, stop_token_ids=frozenset({3, 4}))
    each = sequence([1, 2], [9] * num_output, stop=rules)
    # transformers lets the first token after `min_new_tokens` be a stop token; ours may be the last of `min_tokens`.
    processor = MinNewTokensLengthLogitsProcessor(2, min_new_tokens=2, eos_token_id=[3, 4])
    expected = processor(torch.zeros((1, 2 + num_output)), logits_RV.clone()).argmax(-1)
    assert tokens(logits_RV, each) == expected.tolist()
    may_stop = each.append(3) is FinishReason.STOP
    assert may_stop == (expected.item() == 3)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Whatever was asked for beside them; as many as the row that wants most, and only rows that want them."""
    logits_RV = logits(4)
    rows = [
        sequence(temperature=1.0, top_k=2, logit_bias=((5, 100.0),), logprobs=2),
        sequence(),
        sequence([7], repetition_penalty=3.0, logprobs=0),
        sequence(temperature=0.5, logprobs=5),
    ]
    sampled = sample(logits_RV, *rows)
    reported = sampled.reported
    assert reported is not None
    assert reported.counts == [2, None, 0, 5]
    expected = logits_RV.log_softmax(-1)[[0, 2, 3]]
    chosen = sampled.token_ids_R[[0, 2, 3]]
    assert chosen[0] == 5
    torch.testing.assert_close(
        reported.chosen_R[[0, 2, 3]], expected.gather(1, chosen[:, None])[:, 0], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(reported.top_RC[[0, 2, 3]], expected.topk(5, -1).values, atol=1e-5, rtol=0)
    assert torch.equal(reported.top_ids_RC[[0, 2, 3]], expected.topk(5, -1).indices)


def test_reporting_changes_no_token() -> None:
    """The same rows without it get the same."""
    logits_RV = logits(4)
    wishes: list[dict[str, Any]] = [{"temperature": 1.0}, {"repetition_penalty": 2.0}, {}, {"temperature": 2.0}]
    without = tokens(logits_RV, *[sequence(**wish) for wish in wishes])
    assert tokens(logits_RV, *[sequence(**wish, logprobs=1) for wish in wishes]) == without


@pytest.mark.parametrize(
    "wish", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}]
)
def test_rows_whose_logits_are_no_numbers_are_reported_and_harm_nobody(wish: dict[str, Any]) -> None:
    """NaN and infinity anywhere, or minus infinity everywhere; some minus infinities are no fault."""
    logits_RV = logits(6)
    sound = tokens(logits_RV[[4, 5]], *[sequence(**wish)] * 2)
    logits_RV[0, 17] = torch.nan
    logits_RV[1, 17] = torch.inf
    logits_RV[2] = -torch.inf
    logits_RV[3] = torch.nan
    logits_RV[4, 17] = -torch.inf
    sampled = sample(logits_RV, *[sequence(**wish)] * 6)
    assert sampled.peaks_R.isfinite().tolist() == [False, False, False, False, True, True]
    assert sampled.token_ids_R.tolist()[4:] == sound
    assert all(0 <= token < VOCABULARY for token in sampled.token_ids_R.tolist())


def test_extreme_wishes_are_still_numbers() -> None:
    """The hottest temperature, the highest bias and the strongest penalties leave sound rows."""
    rows = [
        sequence(temperature=100.0),
        sequence(temperature=1e-5, logit_bias=tuple((token, 100.0) for token in range(300))),
        sequence([1] * 200, [1] * 200, temperature=1.0, frequency_penalty=2.0, repetition_penalty=10.0),
        sequence(temperature=1.0, top_p=1e-6, min_p=1.0, top_k=1),
    ]
    assert len(tokens(logits(4), *rows)) == 4
