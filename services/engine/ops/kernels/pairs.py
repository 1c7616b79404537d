"""A few tokens and their experts, each pair of them by itself: no sort, and each matrix is read as by `gemv`.

Every program finds its expert out of the router's logits, which takes less time than a kernel before that does it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait
from services.engine.ops.kernels.route import chosen_by, ranked, shares

_GATED_ROWS, _GATED_COLUMNS = 8, 256
"""Of gate and of up, what a program takes at a time (measured on an H200, as what follows)."""

_DOWN_ROWS, _DOWN_COLUMNS = 16, 256
"""Of all of a token's experts together, what a program takes at a time."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Where tokens go."""

    experts_NA: Tensor
    """int32."""
    shares_NA: Tensor
    """float32: of the softmax over all experts."""


def gated(x_NI: Tensor, logits_NE: Tensor, gate_up_EOI: Tensor, *, top_k: int, first: int) -> tuple[Tensor, Choices]:
    """silu(gate) * up of each pair, [P, F]; pairs of experts that we do not have hold anything. In float32, then rounded
    to the dtype of x."""
    (num_tokens, total), (count, both, inputs) = logits_NE.shape, gate_up_EOI.shape
    h_PF = torch.empty((num_tokens * top_k, both // 2), dtype=x_NI.dtype, device=x_NI.device)
    choices = Choices(
        torch.empty((num_tokens, top_k), dtype=torch.int32, device=x_NI.device),
        torch.empty((num_tokens, top_k), dtype=torch.float32, device=x_NI.device),
    )
    columns = min(_GATED_COLUMNS, triton.next_power_of_2(inputs))
    _experts_gated[(triton.cdiv(both // 2, _GATED_ROWS), num_tokens * top_k)](
        x_NI,
        logits_NE,
        gate_up_EOI,
        h_PF,
        choices.experts_NA,
        choices.shares_NA,
        first,
        count,
        O=both // 2,
        I=inputs,
        E=total,
        A=top_k,
        WIDTH=triton.next_power_of_2(total),
        ROWS=_GATED_ROWS,
        COLUMNS=columns,
        EVEN=inputs % columns == 0,
        num_warps=4,
        **overlapped(x_NI),
    )
    return h_PF, choices


@triton.jit
def _experts_gated(
    x,
    logits,
    weight,
    out,
    experts_out,
    shares_out,
    first,
    count,
    O: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    token = pair // A
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wait(OVERLAP)
    score, rank = ranked(logits + token * E, E, WIDTH)
    is_ours = rank == pair % A
    expert = tl.sum(chosen_by(is_ours[None, :], E, WIDTH), 0)
    if tl.program_id(0) == 0:
        tl.store(experts_out + pair, expert)
        tl.store(shares_out + pair, tl.sum(tl.where(is_ours, shares(score), 0.0), 0))
    expert -= first
    if (expert < 0) | (expert >= count):
        return
    # Rows behind the matrix's last are computed from that one, and not stored.
    at = weight + expert.to(tl.int64) * 2 * O * I + tl.minimum(output, O - 1)[:, None] * I + column[None, :]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, I, COLUMNS, num_stages=3):
        if EVEN:
            g, u = tl.load(at + start), tl.load(at + O * I + start)
            values = tl.load(x + token * I + start + column)
        else:
            there = start + column < I
            g = tl.load(at + start, mask=there[None, :], other=0.0)
            u = tl.load(at + O * I + start, mask=there[None, :], other=0.0)
            values = tl.load(x + token * I + start + column, mask=there, other=0.0)
        gate += g.to(tl.float32) * values.to(tl.float32)[None, :]
        up += u.to(tl.float32) * values.to(tl.float32)[None, :]
    found = tl.sum(gate, 1)
    tl.store(out + pair * O + output, found * tl.sigmoid(found) * tl.sum(up, 1), mask=output < O)


def down(
    h_PF: Tensor, choices: Choices, down_EIF: Tensor, *, first: int, normalize: bool, add: Tensor | None
) -> Tensor:
    """The sum of what a token's experts answer by weight, plus `add`, [N, I]; all of a token's experts by one program.
    Rounded once."""
    (count, outputs, inputs), (num_tokens, top_k) = down_EIF.shape, choices.experts_NA.shape
    out = torch.empty((num_tokens, outputs), dtype=h_PF.dtype, device=h_PF.device)
    slots = triton.next_power_of_2(top_k)
    rows = max(1, _DOWN_ROWS // slots)
    columns = min(_DOWN_COLUMNS, triton.next_power_of_2(inputs))
    _experts_down[(triton.cdiv(outputs, rows), num_tokens)](
        h_PF,
        down_EIF,
        choices.experts_NA,
        choices.shares_NA,
        h_PF if add is None else add,
        out,
        first,
        count,
        O=outputs,
        I=inputs,
        A=top_k,
        SLOTS=slots,
        ROWS=rows,
        COLUMNS=columns,
        EVEN=inputs % columns == 0,
        NORMALIZE=normalize,
        ADD=add is not None,
        num_warps=4,
        **overlapped(out),
    )
    return out


@triton.jit
def _experts_down(
    h,
    weight,
    experts,
    shares,
    add,
    out,
    first,
    count,
    O: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, COLUMNS)
    wait(OVERLAP)
    expert = tl.load(experts + token * A + slot, mask=slot < A, other=-1) - first
    share = tl.load(shares + token * A + slot, mask=slot < A, other=0.0)
    ours = (slot < A) & (expert >= 0) & (expert < count)
    row = tl.where(ours, expert, 0).to(tl.int64)[:, None] * O + tl.minimum(output, O - 1)[None, :]
    matrices = weight + row[:, :, None] * I + column[None, None, :]
    values = h + (token * A + slot)[:, None] * I + column[None, :]
    total = tl.zeros((SLOTS, ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, I, COLUMNS, num_stages=3):
        there = ours[:, None] & (column < COLUMNS)[None, :]
        if not EVEN:
            there = there & (start + column < I)[None, :]
        w = tl.load(matrices + start, mask=there[:, None, :], other=0.0)
        v = tl.load(values + start, mask=there, other=0.0)
        total += w.to(tl.float32) * v.to(tl.float32)[:, None, :]
    if NORMALIZE:
        share = share / tl.sum(share, 0)
    found = tl.sum(tl.sum(total, 2) * tl.where(ours, share, 0.0)[:, None], 0)
    if ADD:
        found += tl.load(add + token * O + output, mask=output < O, other=0.0).to(tl.float32)
    tl.store(out + token * O + output, found, mask=output < O)
