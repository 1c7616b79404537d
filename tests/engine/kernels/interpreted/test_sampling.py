"""The kernels that choose tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.kernel_sampler import KernelSampler
from services.engine.ops import sampling as specified
from services.engine.ops.kernels.candidates import groups
from services.engine.ops.kernels.draw import draw
from services.engine.ops.kernels.floors import floors
from services.engine.ops.parameters import Floats, Integers, Parameters
from services.engine.sampler import Sampled, TorchSampler
from services.engine.sequence import Sequence, StopRules
from tests.engine import slots as slotted
from tests.engine.slots import admitted, sequence

# The logarithm of a group without probability is minus infinity, as it should be, and a row of NaN is one; NumPy warns.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:RuntimeWarning")
    for text in ("divide by zero", "invalid value encountered", "All-NaN slice", "overflow encountered")
]
pytestmark.append(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))

VOCAB = 5000


def parameters(num_slots: int, **values: Any) -> Parameters:
    """Of slots that ask for these: numbers, or one for each slot."""
    made = Parameters.zeros(num_slots, num_entries=8, device=torch.device("cpu"))
    for name, value in {"top_p": 1.0, "repetition": 1.0, **values}.items():
        table = made.floats if name in Floats._fields else made.integers
        getattr(table, name).copy_(torch.as_tensor(value))
    return made


def test_tokens_are_those_of_the_specification() -> None:
    """Greedy rows and drawn ones, by their slots' parameters, written to their slots' positions."""
    logits = 3 * torch.randn(6, VOCAB)
    slots, positions = torch.tensor([4, 0, 3, 5, 1, 2]), torch.tensor([5, 6, 7, 1000, 9, 10])
    seeds = torch.randint(0, 1 << 32, (2, 7))
    temperatures = torch.tensor([0, 1, 0.7, 1.3, 0, 1, 0])
    asked = parameters(
        7, temperature=temperatures, seed_low=seeds[0], seed_high=seeds[1], choice=torch.arange(7), top_k=3
    )
    tokens = torch.zeros(7, 1001, dtype=torch.int32)
    token_ids, peaks = draw(logits, asked, slots, positions, tokens)
    temperature = temperatures[slots]
    drawn = temperature > 0
    expected = logits.argmax(-1)
    p = specified.probabilities(logits[drawn].clone(), temperature[drawn])
    expected[drawn] = specified.draw(
        p, seed_R2=seeds[:, slots[drawn]].T, position_R=positions[drawn], choice_R=slots[drawn]
    )
    assert torch.equal(token_ids, expected)
    assert torch.equal(peaks, logits.amax(-1))
    assert torch.equal(tokens[slots, positions].long(), expected)
    assert torch.count_nonzero(tokens) == torch.count_nonzero(expected)


def test_the_first_among_equals_is_taken() -> None:
    """Also where the others stand in other parts of the vocabulary."""
    logits = torch.zeros(1, VOCAB)
    logits[0, [70, 71, 4000]] = 1.0
    nobody = torch.zeros(1, dtype=torch.int64)
    token_ids, _ = draw(logits, parameters(1), nobody, nobody, torch.zeros(1, 1, dtype=torch.int32))
    assert token_ids.tolist() == [70]


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 0.9},
        {"logprobs": 3},
    ],
    ids=["likeliest", "drawn", "shaped", "nucleus", "reported"],
)
def test_logits_that_are_no_numbers_show(wish: dict[str, Any]) -> None:
    """The row's peak is no finite number, its token one of the vocabulary; other rows do not notice."""
    logits = torch.zeros(5, VOCAB)
    logits[0, 3000], logits[1], logits[2, 8] = math.nan, -math.inf, 1000.0
    logits[3], logits[4, 70] = math.nan, math.inf
    state, selection = admitted(*[sequence(**wish)] * 5)
    sampled = KernelSampler(state)(logits, selection)
    assert sampled.peaks_R.isfinite().tolist() == [False, False, True, False, False]
    assert sampled.peaks_R[2] == 1000.0
    assert all(0 <= token < VOCAB for token in sampled.token_ids_R.tolist()) and sampled.token_ids_R[2] == 8


@pytest.mark.parametrize("kind", ["noise", "ties", "steep", "flat", "some minus infinity"])
def test_floors_keep_what_the_specification_keeps(kind: str) -> None:
    """Top-k, top-p and min-p, alone and together, in rows of all kinds, with candidates in their list and beyond its end."""
    wishes = list(itertools.product((0, 1, 7, 39, 41, VOCAB + 1), (1.0, 0.999, 0.6, 1e-4), (0.0, 0.05)))
    logits = logits_of(kind, len(wishes))
    temperature = torch.linspace(0.4, 1.6, len(wishes))
    top_k, top_p, min_p = (torch.tensor(each) for each in zip(*wishes, strict=True))
    asked = parameters(len(wishes), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, shaped=1)
    slots = torch.arange(len(wishes))
    found = groups(logits, slots, asked.integers.shaped, temperature)
    least = floors(logits, found, asked, slots)
    p = specified.probabilities(logits.clone(), temperature)
    for row, (k, kept, times) in enumerate(wishes):
        expected = p[row : row + 1].clone()
        if k:
            specified.keep_top_k(expected, torch.tensor([k]), most=k)
        specified.keep_top_p(expected, torch.tensor([kept]))
        specified.keep_min_p(expected, torch.tensor([times]))
        mine = (p[row] > 0) & (logits[row] >= least[row])
        # A token at the very edge may be rounded to either side of it.
        apart = mine != (expected[0] > 0)
        assert apart.sum() <= 1, (kind, wishes[row])
        assert p[row][apart].sum() < 1e-3, (kind, wishes[row])


def logits_of(kind: str, num_rows: int) -> Tensor:
    logits = 3 * torch.randn(num_rows, VOCAB)
    if kind == "ties":
        return logits.round()
    if kind == "steep":
        return 20 * logits
    if kind == "flat":
        return logits / 1e4
    if kind == "some minus infinity":
        logits[:, ::2] = -torch.inf
    return logits


def test_a_list_of_candidates_that_is_full_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row itself is looked at instead, and the same tokens stay."""
    logits, slots = logits_of("noise", 3), torch.arange(3)
    asked = parameters(3, temperature=1.0, top_p=0.9, top_k=torch.tensor([0, 30, 39]), shaped=1)
    found = groups(logits, slots, asked.integers.shaped, asked.floats.temperature)
    expected = floors(logits, found, asked, slots)
    monkeypatch.setattr("services.engine.ops.kernels.floors.MOST", 16)
    assert torch.equal(floors(logits, found, asked, slots), expected)
    assert (logits >= expected[:, None]).sum(1).min() > 16


PROMPT = [(7 * i * i + 3) % 300 for i in range(40)]
WISHES: list[dict[str, Any]] = [
    *slotted.WISHES,
    {"repetition_penalty": 0.7, "logprobs": 1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 20},
    {"logit_bias": ((7, 5.0), (599, -100.0)), "logprobs": 0},
    {"logit_bias": tuple((token, 100.0 - token) for token in range(600))},
    {"stop": StopRules(100, min_tokens=50, stop_token_ids=frozenset({3, 4})), "logit_bias": ((3, 50.0),)},
    {"stop": StopRules(100, min_tokens=21, stop_token_ids=frozenset({3, 4})), "logit_bias": ((3, 50.0),)},
    {"temperature": 1.0, "top_k": 7, "presence_penalty": 2.0, "logprobs": 5, "seed": 3},
]


def asked(wish: dict[str, Any]) -> Sequence:
    return sequence(PROMPT[:20], PROMPT[20:], **wish)


@pytest.mark.parametrize("vocab_size", [600, VOCAB])
def test_whatever_a_row_asks_for_is_what_the_specification_gives_it(vocab_size: int) -> None:
    """Every wish among all others: the tokens, where they are written, and what is reported."""
    logits = 3 * torch.randn(len(WISHES), vocab_size)
    state, selection = admitted(*map(asked, WISHES))
    expected = TorchSampler(state)(logits.clone(), selection)
    written = state.tokens.clone()
    state.tokens[selection.slots_R, selection.positions_R] = 0
    found = KernelSampler(state)(logits.clone(), selection)
    assert torch.equal(found.token_ids_R, expected.token_ids_R)
    assert torch.equal(state.tokens, written)
    torch.testing.assert_close(found.peaks_R, expected.peaks_R)
    check_reports(found, expected)


def check_reports(found: Sampled, expected: Sampled) -> None:
    assert found.reported is not None and expected.reported is not None
    assert found.reported.counts == expected.reported.counts == [wish.get("logprobs") for wish in WISHES]
    for row, count in enumerate(expected.reported.counts):
        if count is not None:
            for name in ("chosen_R", "top_RC", "top_ids_RC"):
                mine, theirs = getattr(found.reported, name)[row], getattr(expected.reported, name)[row]
                some = slice(count) if mine.ndim else ...
                torch.testing.assert_close(mine[some], theirs[some], atol=1e-5, rtol=1e-5)


def test_a_row_gets_what_it_would_get_alone() -> None:
    """To the last bit, log-probabilities too, and so it does a second time."""
    logits = 3 * torch.randn(len(WISHES), 600)
    state, selection = admitted(*map(asked, WISHES))
    together = KernelSampler(state)(logits.clone(), selection)
    assert together.reported is not None
    for row in range(len(WISHES)):
        one = selection.take([row], torch.tensor([row]))
        alone = KernelSampler(state)(logits[row : row + 1].clone(), one)
        assert torch.equal(alone.token_ids_R[0], together.token_ids_R[row])
        if (count := together.reported.counts[row]) is not None:
            assert alone.reported is not None
            assert torch.equal(alone.reported.chosen_R[0], together.reported.chosen_R[row])
            assert torch.equal(alone.reported.top_RC[0, :count], together.reported.top_RC[row, :count])


@pytest.mark.parametrize("vocab_size", [7, 300, VOCAB])
def test_equals_are_reported_in_the_order_of_their_ids(vocab_size: int) -> None:
    """Behind all that are likelier; no more of them than there are tokens."""
    logits = torch.zeros(1, vocab_size)
    logits[0, vocab_size - 1] = 1.0
    state, selection = admitted(sequence(logprobs=9))
    reported = KernelSampler(state)(logits, selection).reported
    assert reported is not None
    count = min(9, vocab_size)
    assert reported.top_ids_RC[0, :count].tolist() == [vocab_size - 1, *range(count - 1)]
    assert reported.top_RC.shape[1] == min(20, vocab_size)
    torch.testing.assert_close(reported.top_RC[0, :count], logits.log_softmax(-1).topk(count).values[0])


def test_numbers_and_their_names() -> None:
    """A row of the tables for each name, in the order that both are made in."""
    made = parameters(2, frequency=torch.tensor([0.5, 0.25]), num_top=torch.tensor([3, 4]))
    assert made.floats_FS[Floats._fields.index("frequency")].tolist() == [0.5, 0.25]
    floats, integers = made.take(torch.tensor([1]))
    assert (floats.frequency.tolist(), integers.num_top.tolist()) == ([0.25], [4])
    assert len(made.integers_IS) == len(Integers._fields)
