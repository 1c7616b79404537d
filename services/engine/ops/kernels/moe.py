"""A mixture of experts by whichever kernels suit the number of tokens."""

from __future__ import annotations

from torch import Tensor

from services.engine.ops.kernels import grouped, pairs
from services.engine.ops.kernels.grouping import group
from services.engine.ops.kernels.route import route
from services.engine.ops.moe import Experts

INVARIANT_ROWS = 32
"""Pairs of a tile where their number must not decide. Those of larger tiles are halved for an expert's last pairs."""


def mixture(
    x_NI: Tensor, logits_NE: Tensor, experts: Experts, *, top_k: int, normalize: bool, add: Tensor | None
) -> Tensor:
    """As `ops.moe.mixture`, of dense stacks. An expert's answer is not rounded where pairs are few, and to the dtype of x
    otherwise; the sum with `add` is, once."""
    (gate_up_EOI,), (down_EIF,) = experts.gate_up, experts.down
    first, count, num_pairs = experts.first, experts.count, len(x_NI) * top_k
    if not experts.invariant and is_few(num_pairs, experts.total):
        h_PF, choices = pairs.gated(x_NI, logits_NE, gate_up_EOI, top_k=top_k, first=first)
        return pairs.down(h_PF, choices, down_EIF, first=first, normalize=normalize, add=add)
    weights_NA, experts_NA = route(logits_NE, top_k=top_k, normalize=normalize)
    rows = INVARIANT_ROWS if experts.invariant else tile_rows(num_pairs, experts.total)
    groups = group(experts_NA, first=first, count=count, rows=rows)
    h_PF = grouped.gated(x_NI, gate_up_EOI, groups, top_k=top_k)
    answers_PI = grouped.down(h_PF, down_EIF, groups)
    return grouped.weighed(answers_PI, weights_NA, experts_NA, first=first, count=count, add=add)


def is_few(num_pairs: int, num_experts: int) -> bool:
    """Whether pairs are best computed one by one: then each reads its expert's matrices. With a pair for every fourth
    expert, one in eight reads what another has read."""
    return 4 * num_pairs <= num_experts


def tile_rows(num_pairs: int, num_experts: int) -> int:
    """Most pairs of a tile: twice what an expert has in the mean, so that hardly any needs a second tile, which reads
    its matrices again; up to what fits registers. Not yet measured on a GPU."""
    mean = num_pairs / num_experts
    return next((rows for rows in (16, 32, 64) if 2 * mean <= rows), 128)
