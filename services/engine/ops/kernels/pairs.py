"""A few tokens and their experts, each pair of them by itself: no sort, and each matrix is read as by `gemv`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.ops.kernels.overlap import overlapped, wait

_GATED_ROWS, _GATED_COLUMNS = 2, 1024
"""Of gate and of up, what a program takes at a time. Not yet measured on a GPU, as what follows."""

_DOWN_ROWS, _DOWN_COLUMNS = 16, 256
"""Of all of a token's experts together, what a program takes at a time."""


def gated(x_NI: Tensor, gate_up_EOI: Tensor, experts_NA: Tensor, *, first: int) -> Tensor:
    """silu(gate) * up of each pair, [P, F]; pairs of experts that we do not have hold anything. In float32, then rounded
    to the dtype of x."""
    (num_experts, both, inputs), num_pairs = gate_up_EOI.shape, experts_NA.numel()
    h_PF = torch.empty((num_pairs, both // 2), dtype=x_NI.dtype, device=x_NI.device)
    columns = min(_GATED_COLUMNS, triton.next_power_of_2(inputs))
    _experts_gated[(triton.cdiv(both // 2, _GATED_ROWS), num_pairs)](
        x_NI,
        gate_up_EOI,
        experts_NA,
        h_PF,
        first,
        num_experts,
        O=both // 2,
        I=inputs,
        A=experts_NA.shape[1],
        ROWS=_GATED_ROWS,
        COLUMNS=columns,
        EVEN=inputs % columns == 0,
        num_warps=4,
        **overlapped(x_NI),
    )
    return h_PF


@triton.jit
def _experts_gated(
    x,
    weight,
    experts,
    out,
    first,
    num_experts,
    O: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wait(OVERLAP)
    expert = tl.load(experts + pair) - first
    if (expert < 0) | (expert >= num_experts):
        return
    # Rows behind the matrix's last are computed from that one, and not stored.
    at = weight + expert.to(tl.int64) * 2 * O * I + tl.minimum(output, O - 1)[:, None] * I + column[None, :]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, I, COLUMNS, num_stages=3):
        if EVEN:
            g, u = tl.load(at + start), tl.load(at + O * I + start)
            values = tl.load(x + pair // A * I + start + column)
        else:
            there = start + column < I
            g = tl.load(at + start, mask=there[None, :], other=0.0)
            u = tl.load(at + O * I + start, mask=there[None, :], other=0.0)
            values = tl.load(x + pair // A * I + start + column, mask=there, other=0.0)
        gate += g.to(tl.float32) * values.to(tl.float32)[None, :]
        up += u.to(tl.float32) * values.to(tl.float32)[None, :]
    found = tl.sum(gate, 1)
    tl.store(out + pair * O + output, found * tl.sigmoid(found) * tl.sum(up, 1), mask=output < O)


def down(
    h_PF: Tensor, down_EIF: Tensor, weights_NA: Tensor, experts_NA: Tensor, *, first: int, add: Tensor | None
) -> Tensor:
    """The sum of what a token's experts answer by weight, plus `add`, [N, I]; all of a token's experts by one program.
    Rounded once."""
    (num_experts, outputs, inputs), (num_tokens, top_k) = down_EIF.shape, weights_NA.shape
    out = torch.empty((num_tokens, outputs), dtype=h_PF.dtype, device=h_PF.device)
    slots = triton.next_power_of_2(top_k)
    rows = max(1, _DOWN_ROWS // slots)
    columns = min(_DOWN_COLUMNS, triton.next_power_of_2(inputs))
    _experts_down[(triton.cdiv(outputs, rows), num_tokens)](
        h_PF,
        down_EIF,
        weights_NA,
        experts_NA,
        h_PF if add is None else add,
        out,
        first,
        num_experts,
        O=outputs,
        I=inputs,
        A=top_k,
        SLOTS=slots,
        ROWS=rows,
        COLUMNS=columns,
        EVEN=inputs % columns == 0,
        ADD=add is not None,
        num_warps=4,
        **overlapped(out),
    )
    return out


@triton.jit
def _experts_down(
    h,
    weight,
    weights,
    experts,
    add,
    out,
    first,
    num_experts,
    O: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, COLUMNS)
    wait(OVERLAP)
    expert = tl.load(experts + token * A + slot, mask=slot < A, other=-1) - first
    ours = (slot < A) & (expert >= 0) & (expert < num_experts)
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
    share = tl.load(weights + token * A + slot, mask=ours, other=0.0)
    found = tl.sum(tl.sum(total, 2) * share[:, None], 0)
    if ADD:
        found += tl.load(add + token * O + output, mask=output < O, other=0.0).to(tl.float32)
    tl.store(out + token * O + output, found, mask=output < O)
