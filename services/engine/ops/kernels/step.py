"""The beginning of a decode step: from slots and positions to what the model reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def lay_out(
    slots_S: Tensor, starts_S: Tensor, tokens: Tensor, tables: Tensor, *, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For works of one token each: its id and position, where its keys and values go, all int64, and the keys it sees,
    itself among them, int32; [S] each. `tokens` and `tables` are those of `DeviceState`."""
    num_works, device = len(slots_S), slots_S.device
    ids_S = torch.empty(num_works, dtype=torch.int64, device=device)
    positions_S, writes_S = torch.empty_like(ids_S), torch.empty_like(ids_S)
    lengths_S = torch.empty(num_works, dtype=torch.int32, device=device)
    _lay_out[(triton.cdiv(num_works, 32),)](
        slots_S, starts_S, tokens, tables, ids_S, positions_S, writes_S, lengths_S,
        num_works, tokens.stride(0), tables.stride(0), T=block_size, B=32, num_warps=1,
    )  # fmt: skip
    return ids_S, positions_S, writes_S, lengths_S


@triton.jit
def _lay_out(slots, starts, tokens, tables, ids, positions, writes, lengths, num_works, token_stride, table_stride, T: tl.constexpr, B: tl.constexpr):  # fmt: skip
    work = tl.program_id(0) * B + tl.arange(0, B)
    inside = work < num_works
    slot = tl.load(slots + work, mask=inside, other=0).to(tl.int64)
    position = tl.load(starts + work, mask=inside, other=0).to(tl.int64)
    token = tl.load(tokens + slot * token_stride + position, mask=inside, other=0)
    block = tl.load(tables + slot * table_stride + position // T, mask=inside, other=0).to(tl.int64)
    tl.store(ids + work, token.to(tl.int64), mask=inside)
    tl.store(positions + work, position, mask=inside)
    tl.store(writes + work, block * T + position % T, mask=inside)
    tl.store(lengths + work, (position + 1).to(tl.int32), mask=inside)
