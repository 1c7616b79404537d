"""The beginning of a step: from slots and positions to what the model reads.

Shapes: N tokens of the step, S works.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def lay_out(
    slots_S: Tensor,
    starts_S: Tensor,
    grown_S: Tensor,
    blocks_S: Tensor,
    tokens: Tensor,
    tables: Tensor,
    *,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For works of one token each: its id and position, where its keys and values go, all int64, and the keys it sees,
    itself among them, int32; [S] each. `tokens` and `tables` are those of `DeviceState`; first of all entry `grown` of a work's
    table, unless that is negative, becomes `block`."""
    num_works, device = len(slots_S), slots_S.device
    ids_S = torch.empty(num_works, dtype=torch.int64, device=device)
    positions_S, writes_S = torch.empty_like(ids_S), torch.empty_like(ids_S)
    lengths_S = torch.empty(num_works, dtype=torch.int32, device=device)
    _lay_out[(triton.cdiv(num_works, 32),)](
        slots_S, starts_S, grown_S, blocks_S, tokens, tables, ids_S, positions_S, writes_S, lengths_S,
        num_works, tokens.stride(0), tables.stride(0), T=block_size, B=32, num_warps=1,
    )  # fmt: skip
    return ids_S, positions_S, writes_S, lengths_S


@triton.jit
def _lay_out(
    slots, starts, grown, blocks, tokens, tables, ids, positions, writes, lengths,
    num_works, token_stride, table_stride, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    work = tl.program_id(0) * B + tl.arange(0, B)
    inside = work < num_works
    slot = tl.load(slots + work, mask=inside, other=0).to(tl.int64)
    position = tl.load(starts + work, mask=inside, other=0).to(tl.int64)
    token = tl.load(tokens + slot * token_stride + position, mask=inside, other=0)
    entry = tl.load(grown + work, mask=inside, other=-1)
    new = tl.load(blocks + work, mask=inside, other=0)
    tl.store(tables + slot * table_stride + entry, new, mask=inside & (entry >= 0))
    known = tl.load(tables + slot * table_stride + position // T, mask=inside, other=0)
    block = tl.where(entry == position // T, new, known).to(tl.int64)
    tl.store(ids + work, token.to(tl.int64), mask=inside)
    tl.store(positions + work, position, mask=inside)
    tl.store(writes + work, block * T + position % T, mask=inside)
    tl.store(lengths + work, (position + 1).to(tl.int32), mask=inside)


class Layout(NamedTuple):
    """Of works of any number of tokens."""

    ids_N: Tensor
    positions_N: Tensor
    write_slots_N: Tensor
    """All int64."""
    lengths_S: Tensor
    """int32: the keys that each work's last token sees."""
    decode_lengths_S: Tensor
    """The same of the works that are decodes; 0 for others."""
    prefill_counts_S: Tensor
    """int32: the tokens of the works that are no decodes; 0 for others."""


def lay_out_works(
    slots_S: Tensor,
    starts_S: Tensor,
    query_starts: Tensor,
    num_decodes_1: Tensor,
    tokens: Tensor,
    tables: Tensor,
    *,
    num_tokens: int,
    block_size: int,
    spare_block: int,
) -> Layout:
    """For works whose first tokens among N stand in `query_starts` (S + 1 of them, the last how many tokens there are),
    of which the first `num_decodes` are decodes; all int32. Where there are fewer than `num_tokens`, the rest are token 0
    at position 0, and what they leave goes to the spare block."""
    num_works, device = len(slots_S), slots_S.device
    assert num_works <= num_tokens, f"{num_works} works have {num_tokens} tokens"
    ids_N = torch.empty(num_tokens, dtype=torch.int64, device=device)
    lengths_S = torch.empty(num_works, dtype=torch.int32, device=device)
    layout = Layout(
        ids_N, torch.empty_like(ids_N), torch.empty_like(ids_N),
        lengths_S, torch.empty_like(lengths_S), torch.empty_like(lengths_S),
    )  # fmt: skip
    _lay_out_works[(triton.cdiv(num_tokens, 128),)](
        slots_S, starts_S, query_starts, num_decodes_1, tokens, tables, *layout,
        num_tokens, num_works, spare_block * block_size, tokens.stride(0), tables.stride(0),
        T=block_size, HALVINGS=num_works.bit_length(), B=128, num_warps=4,
    )  # fmt: skip
    return layout


@triton.jit
def _lay_out_works(
    slots, starts, query_starts, num_decodes, tokens, tables,
    ids, positions, writes, lengths, decode_lengths, prefill_counts,
    num_tokens, num_works, spare_slot, token_stride, table_stride,
    T: tl.constexpr, HALVINGS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Some tokens, and as many works."""
    each = tl.program_id(0) * B + tl.arange(0, B)
    inside, is_there = each < num_tokens, each < tl.load(query_starts + num_works)
    # The last work that begins at this token or before it.
    work = tl.zeros((B,), tl.int32)
    for halving in tl.static_range(HALVINGS):
        further = work + (1 << (HALVINGS - 1 - halving))
        begins = tl.load(query_starts + further, mask=further < num_works, other=2147483647)
        work = tl.where(begins <= each, further, work)
    slot = tl.load(slots + work, mask=is_there, other=0).to(tl.int64)
    position = tl.load(starts + work, mask=is_there, other=0) + each - tl.load(query_starts + work)
    position = tl.where(is_there, position, 0).to(tl.int64)
    token = tl.load(tokens + slot * token_stride + position, mask=is_there, other=0)
    block = tl.load(tables + slot * table_stride + position // T, mask=is_there, other=0).to(tl.int64)
    tl.store(ids + each, token.to(tl.int64), mask=inside)
    tl.store(positions + each, position, mask=inside)
    tl.store(writes + each, tl.where(is_there, block * T + position % T, spare_slot), mask=inside)

    inside, decodes = each < num_works, each < tl.load(num_decodes)
    count = tl.load(query_starts + each + 1, mask=inside, other=0) - tl.load(query_starts + each, mask=inside, other=0)
    length = tl.load(starts + each, mask=inside, other=0) + count
    tl.store(lengths + each, length, mask=inside)
    tl.store(decode_lengths + each, tl.where(decodes, length, 0), mask=inside)
    tl.store(prefill_counts + each, tl.where(decodes, 0, count), mask=inside)
