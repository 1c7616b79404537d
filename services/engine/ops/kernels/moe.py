"""A mixture of experts by whichever kernels suit the number of tokens."""

from __future__ import annotations

from torch import Tensor

from services.engine.ops.kernels import grouped, pairs
from services.engine.ops.kernels.grouping import group
from services.engine.ops.moe import Experts


def mix(
    x_NI: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    experts: Experts,
    *,
    add: Tensor | None,
) -> Tensor:
    """As `ops.moe.mix`, of dense stacks. An expert's answer is not rounded where pairs are few, and to the dtype of x
    otherwise; the sum with `add` is, once."""
    (gate_up_EOI,), (down_EIF,) = experts.gate_up, experts.down
    first, count, num_pairs = experts.first, experts.count, experts_NA.numel()
    if is_few(num_pairs, experts.total):
        h_PF = pairs.gated(x_NI, gate_up_EOI, experts_NA, first=first)
        return pairs.down(h_PF, down_EIF, weights_NA, experts_NA, first=first, add=add)
    groups = group(experts_NA, first=first, count=count, rows=tile_rows(num_pairs, experts.total))
    h_PF = grouped.gated(x_NI, gate_up_EOI, groups, top_k=experts_NA.shape[1])
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
