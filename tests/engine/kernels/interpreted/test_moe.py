"""Routing, grouping, and the experts' products, whatever the regime."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops import moe as specified
from services.engine.ops.kernels import grouped, moe, pairs
from services.engine.ops.kernels.grouping import Groups, group
from services.engine.ops.kernels.route import route
from services.engine.ops.moe import Experts

# Triton's interpreter takes the number out of an array of one.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def drawn(num_tokens: int, num_experts: int, *, hidden: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tokens, and the experts' stacks."""
    draw = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=draw)
    gate_up = torch.randn(num_experts, 2 * size, hidden, generator=draw) * hidden**-0.5
    down = torch.randn(num_experts, hidden, size, generator=draw) * size**-0.5
    return x.to(dtype), gate_up.to(dtype), down.to(dtype)


def chosen(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts, each token's all different."""
    draw = torch.Generator().manual_seed(num_tokens)
    experts = torch.rand(num_tokens, num_experts, generator=draw).argsort(-1)[:, :top_k].int()
    return torch.rand(num_tokens, top_k, generator=draw), experts


def stacked(gate_up: Tensor, down: Tensor, *, first: int = 0, total: int | None = None) -> Experts:
    """As on a GPU."""
    return Experts((gate_up,), (down,), first, len(gate_up), first + len(gate_up) if total is None else total)


def definition(x: Tensor, weights_NA: Tensor, experts_NA: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """In float64, a choice after the other."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for weights, experts in zip(weights_NA.T, experts_NA.T.long(), strict=True):
        gate, up = torch.einsum("noi,ni->no", gate_up[experts].double(), x.double()).chunk(2, -1)
        answers = torch.einsum("nif,nf->ni", down[experts].double(), F.silu(gate) * up)
        out += weights[:, None].double() * answers
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 128, 8), (7, 5, 2), (33, 60, 3), (3, 8, 8)])
def test_routes_are_the_routes(num_tokens: int, num_experts: int, top_k: int, normalize: bool) -> None:
    """The same experts in the same order with the same weights, also where none of the numbers is a power of two."""
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits += torch.arange(num_experts) * 1e-5  # so that no two are equal
    weights, experts = route(logits, top_k=top_k, normalize=normalize)
    expected, where = specified.route(logits, top_k=top_k, normalize=normalize)
    assert torch.equal(experts.long(), where)
    torch.testing.assert_close(weights, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_token_without_numbers_goes_to_experts_that_there_are() -> None:
    """Its row fails, but nothing is read beyond the stacks."""
    logits = torch.full((2, 5), torch.nan)
    logits[1] = torch.tensor([1.0, torch.nan, 2.0, -torch.inf, 0.0])
    _, experts = route(logits, top_k=3, normalize=True)
    assert ((experts >= 0) & (experts < 5)).all()


def check(groups: Groups, experts_NA: Tensor, *, first: int, count: int) -> None:
    """Every pair of ours lies in one tile of its expert, in order; the other tiles are empty."""
    flat, seen = experts_NA.flatten().tolist(), []
    for expert, begin, end in groups.tiles_3T.T.tolist():
        for place in range(begin, min(end, begin + groups.rows)):
            pair = int(groups.order_P[place])
            assert flat[pair] == first + expert
            seen.append(pair)
    wanted = [pair for pair, expert in enumerate(flat) if first <= expert < first + count]
    assert seen == sorted(wanted, key=lambda pair: (flat[pair], pair))


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("num_tokens", [1, 7, 33, 200, 900])
@pytest.mark.parametrize(("first", "count"), [(0, 11), (3, 4), (10, 1)])
def test_pairs_are_grouped_by_expert(num_tokens: int, rows: int, first: int, count: int) -> None:
    """Of all experts or a range of them, in their order, for more pairs than a program looks at at once."""
    _, experts_NA = chosen(num_tokens, 11, 3)
    check(group(experts_NA, first=first, count=count, rows=rows), experts_NA, first=first, count=count)


@pytest.mark.parametrize("expert", [0, 4, 10])
def test_all_tokens_may_go_to_one_expert(expert: int) -> None:
    """Then it has all tiles but those that every expert leaves empty."""
    experts_NA = torch.full((100, 1), expert, dtype=torch.int32)
    groups = group(experts_NA, first=0, count=11, rows=16)
    check(groups, experts_NA, first=0, count=11)
    assert int((groups.tiles_3T[1] < groups.tiles_3T[2]).sum()) == 7


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33, 200])
@pytest.mark.parametrize(("hidden", "size", "num_experts", "top_k"), [(64, 32, 6, 2), (40, 24, 11, 3)])
def test_grouped_experts_answer_as_specified(
    num_tokens: int, hidden: int, size: int, num_experts: int, top_k: int
) -> None:
    """With and without something to add, in whole tiles, half ones and ragged ones, where an expert has no token and holds no
    numbers; in float32, to what its roundings are."""
    x, gate_up, down = drawn(num_tokens, num_experts, hidden=hidden, size=size, dtype=torch.float32)
    weights_NA, experts_NA = chosen(num_tokens, num_experts - 1, top_k)
    expected = definition(x, weights_NA, experts_NA, gate_up, down)
    gate_up[-1], down[-1] = torch.nan, torch.nan
    add = torch.randn_like(x)
    rows = moe.tile_rows(experts_NA.numel(), num_experts)
    groups = group(experts_NA, first=0, count=num_experts, rows=rows)
    answers = grouped.down(grouped.gated(x, gate_up, groups, top_k=top_k), down, groups)
    for more in (None, add):
        wanted = expected if more is None else expected + more
        got = grouped.weighed(answers, weights_NA, experts_NA, first=0, count=num_experts, add=more)
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "size", "num_experts", "top_k"),
    [(1, 64, 32, 6, 2), (1, 24, 10, 11, 3), (2, 24, 10, 11, 3), (7, 24, 10, 11, 3)],
)
def test_pairs_are_answered_as_specified(
    num_tokens: int, hidden: int, size: int, num_experts: int, top_k: int, normalize: bool
) -> None:
    """One by one, from the router's logits on."""
    x, gate_up, down = drawn(num_tokens, num_experts, hidden=hidden, size=size, dtype=torch.float32)
    logits, add = torch.randn(num_tokens, num_experts), torch.randn_like(x)
    weights_NA, experts_NA = specified.route(logits, top_k=top_k, normalize=normalize)
    expected = definition(x, weights_NA, experts_NA, gate_up, down) + add
    h, choices = pairs.gated(x, logits, gate_up, top_k=top_k, first=0)
    got = pairs.down(h, choices, down, first=0, normalize=normalize, add=add)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_tokens", "hidden", "size"), [(1, 48, 32), (40, 128, 128)])
def test_answers_in_sixteen_bits_are_near(num_tokens: int, hidden: int, size: int) -> None:
    """In either regime, whichever is taken: as near to the truth as the specification. In float16, as the interpreter does
    not multiply bfloat16."""
    x, gate_up, down = drawn(num_tokens, 12, hidden=hidden, size=size, dtype=torch.float16)
    logits = torch.randn(num_tokens, 12)
    assert moe.is_few(3 * num_tokens, 12) == (num_tokens == 1)
    truth = definition(x, *specified.route(logits, top_k=3, normalize=True), gate_up, down)
    got = moe.mixture(x, logits, stacked(gate_up, down), top_k=3, normalize=True, add=None)
    theirs = specified.mixture(x, logits, Experts.of(gate_up, down), top_k=3, normalize=True)
    assert (got.double() - truth).norm() <= 1.2 * (theirs.double() - truth).norm()


@pytest.mark.parametrize(("num_tokens", "cut"), [(1, 1), (1, 7), (30, 1)])
def test_parts_of_the_experts_add_up_to_the_whole(num_tokens: int, cut: int) -> None:
    """Also where a part has none of the step's experts: then it answers nothing."""
    x, gate_up, down = drawn(num_tokens, 12, hidden=32, size=16, dtype=torch.float32)

    def mixture(experts: Experts, logits: Tensor, add: Tensor | None = None) -> Tensor:
        return moe.mixture(x, logits, experts, top_k=3, normalize=True, add=add)

    logits = torch.randn(num_tokens, 12)
    low = stacked(gate_up[:cut], down[:cut], total=12)
    high = stacked(gate_up[cut:], down[cut:], first=cut)
    whole = mixture(stacked(gate_up, down), logits, add=x)
    torch.testing.assert_close(mixture(high, logits, add=mixture(low, logits)) + x, whole)
    logits[:, :cut] = -100.0
    if cut == 1:
        assert not mixture(low, logits).any()


def test_a_tile_mostly_holds_all_pairs_of_an_expert() -> None:
    """By the mean number of them; the thresholds as documented."""
    assert [moe.tile_rows(8 * tokens, 128) for tokens in (8, 32, 128, 256, 512, 2048)] == [16, 16, 16, 32, 64, 128]
    assert [moe.is_few(8 * tokens, 128) for tokens in (1, 4, 5)] == [True, True, False]
