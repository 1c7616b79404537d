"""Attention over the paged cache: causal, grouped heads, any mix of decode rows and prefill chunks in one batch.

`plan` works out once a step what all layers share: where each token's keys and values go, which blocks are read, and
what is masked. `paged_attention` is the op.

The torch form gathers the blocks of a group of sequences into padded keys and values and attends to them with torch's
flash kernel, or, where sinks or a cap on the scores are asked for, with plain matrix products in float32. Decode rows of
like length share a group; a prefill chunk is a group of its own. A window's blocks alone are gathered. What is hidden
counts with a weight of zero, and zero times NaN is NaN: so behind its end a row gathers its own last block again, the rest
of which is cleared when it is begun, and never what others wrote.

Shapes: N tokens of the step, S sequences of a group, H query heads, K kv heads, G = H / K, D head size, Q query tokens
of a prefill chunk, C keys of a group, B blocks, T tokens of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from services.engine.kv_cache import KVCache, Slots
    from services.engine.ops.kernels.attention import PagedPlan
    from services.engine.state import Batch

# Decode rows whose block counts round up to the same power of two share a group, so that padding at most doubles what
# is read; below this many blocks all share one, since a further group costs more than the padding.
_SMALLEST_GROUP = 8
# Query tokens of a chunk whose scores the plain form holds at once.
_TILE = 256


class AttentionPlan:
    """What every layer of one step shares. Valid for one batch and one cache, on which the layers of one window agree."""

    def __init__(self, batch: Batch, cache: KVCache, *, invariant: bool) -> None:
        self._invariant = invariant
        self.write_slots_N = batch.write_slots_N
        self._batch = batch
        self._cache = cache
        self._groups: dict[int | None, list[Group]] = {}

    @cached_property
    def slots(self) -> Slots:
        """Where the step's tokens go, as the cache's index."""
        return self._cache.locate(self.write_slots_N)

    @cached_property
    def kernels(self) -> PagedPlan:
        """What the kernels of a GPU share."""
        from services.engine.ops.kernels.attention import PagedPlan

        return PagedPlan(self._batch, self._cache, invariant=self._invariant)

    def groups(self, window: int | None) -> list[Group]:
        """The groups for layers of this window; the same list at every call."""
        groups = self._groups.get(window)
        if groups is None:
            if not self._groups:
                self._clear_rests()
            groups = self._groups[window] = list(self._decode_groups(window)) + list(self._prefill_groups(window))
        return groups

    def _clear_rests(self) -> None:
        """Zeroes what lies behind the step's tokens in the blocks that it begins: another sequence's, perhaps NaN."""
        end = 0
        for query_len, kv_len in zip(self._batch.query_lens, self._batch.kv_lens, strict=True):
            end += query_len
            filled = kv_len % self._cache.block_size
            if 0 < filled <= query_len:
                block = int(self.slots.blocks_N[end - 1])
                self._cache.clear_rest(block, filled)

    def _decode_groups(self, window: int | None) -> list[Group]:
        batch, block_size = self._batch, self._cache.block_size
        members: defaultdict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(batch.kv_lens[: batch.num_decodes]):
            first = _first_block(length - 1, window=window, block_size=block_size)
            num_blocks = -(-length // block_size) - first
            members[max(num_blocks, _SMALLEST_GROUP).bit_length()].append(row)
        return [Group(batch, self._cache, rows, window=window) for rows in members.values()]

    def _prefill_groups(self, window: int | None) -> list[Group]:
        batch = self._batch
        works = range(batch.num_decodes, len(batch.query_lens))
        return [Group(batch, self._cache, [work], window=window) for work in works]


class Group:
    """Sequences that attend together: decode rows, one query token each, or one prefill chunk."""

    def __init__(self, batch: Batch, cache: KVCache, works: Seq[int], *, window: int | None) -> None:
        device = batch.block_tables.device
        query_lens, kv_lens = [batch.query_lens[w] for w in works], [batch.kv_lens[w] for w in works]
        self.num_sequences = len(works)
        self.num_queries = query_lens[0]
        starts = [kv - query for kv, query in zip(kv_lens, query_lens, strict=True)]
        firsts = [_first_block(start, window=window, block_size=cache.block_size) for start in starts]
        num_blocks = max(-(-kv // cache.block_size) - first for kv, first in zip(kv_lens, firsts, strict=True))
        # Positions below count from the first gathered block of each sequence.
        origins = [first * cache.block_size for first in firsts]
        ends = [kv - origin for kv, origin in zip(kv_lens, origins, strict=True)]
        self.num_keys = max(ends)
        self._window = window
        self._begin = starts[0] - origins[0]
        self._ends_S = None if min(ends) == self.num_keys else torch.tensor(ends, device=device)
        self._mask: Tensor | None = None

        self.tokens = _tokens(batch, works)
        blocks_SB = _blocks(batch, cache, works, firsts=firsts, num_blocks=num_blocks)
        self._blocks = blocks_SB.view(-1)
        self._rows = _block_rows(cache, blocks_SB)

    @property
    def is_prompt(self) -> bool:
        """Whether the keys are exactly the queries' own tokens and no window cuts them: plain causal attention."""
        return self._begin == 0 and self.num_keys == self.num_queries and not self._is_windowed

    @property
    def _is_windowed(self) -> bool:
        return self._window is not None and self.num_keys > self._window

    def gather(self, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the group, each [S, K, C, D]."""
        rows = cache.rows[layer]
        if rows is not None:
            kv = rows.index_select(0, self._rows)
            keys, values = kv.view(self.num_sequences, 2, cache.shape.kv_heads, -1, cache.shape.head_dim).unbind(1)
        else:
            keys, values = (
                x.view(self.num_sequences, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)
                for x in cache.layers[layer].read(self._blocks)
            )
        return keys[:, :, : self.num_keys], values[:, :, : self.num_keys]

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: [S, 1, 1, C] for decode rows, [Q, C] for a chunk; None where nothing is hidden."""
        if self._mask is None:
            seen = self._seen()
            if seen is None:
                return None
            self._mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return self._mask

    def _seen(self) -> Tensor | None:
        device = self._rows.device
        if self.num_queries > 1:
            last = torch.arange(self._begin, self._begin + self.num_queries, device=device)[:, None]
        elif self._ends_S is not None:
            last = self._ends_S[:, None, None, None] - 1
        elif self._is_windowed:
            last = torch.full((1, 1, 1, 1), self.num_keys - 1, device=device)
        else:
            return None
        keys_C = torch.arange(self.num_keys, device=device)
        seen = keys_C <= last
        return seen & (keys_C > last - self._window) if self._window is not None else seen


def plan(batch: Batch, cache: KVCache, *, invariant: bool = False) -> AttentionPlan:
    """What all layers share in the step that computes `batch`. `invariant`: on a GPU a token gathers the same bits whether it
    decodes or stands in a chunk, and whatever stands beside it."""
    plan = AttentionPlan(batch, cache, invariant=invariant)
    if batch.positions_N.is_cuda:
        plan.kernels  # noqa: B018 - lists the work before the first layer has any
    return plan


def paged_attention(
    q_NHD: Tensor,
    cache: KVCache,
    layer: int,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """What each query token gathers from the values of its sequence, [N, H, D]. The keys and values of the step's own
    tokens must have been written. A token at position p sees the positions in (p - window, p].

    scale multiplies the scores; softcap c then makes of each c * tanh(score / c); sinks are one further score a head,
    which takes part in the softmax and brings no value.
    """
    if q_NHD.is_cuda and softcap is None and sinks_H is None:
        return plan.kernels.attend(q_NHD, cache, layer, scale=scale, window=window)
    groups = plan.groups(window)
    if len(groups) == 1:
        return _attend(q_NHD, cache, layer, groups[0], scale=scale, softcap=softcap, sinks_H=sinks_H)
    out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    for group in groups:
        out_NHD[group.tokens] = _attend(
            q_NHD[group.tokens], cache, layer, group, scale=scale, softcap=softcap, sinks_H=sinks_H
        )
    return out_NHD


def _attend(
    q_NHD: Tensor,
    cache: KVCache,
    layer: int,
    group: Group,
    *,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q_NHD.shape
    keys, values = group.gather(cache, layer)
    shape = (num_tokens, cache.shape.kv_heads, -1, head_dim)
    if group.num_queries == 1:
        # [S, K, G, D]: the heads that share keys and values stand where a kernel expects query tokens.
        q = q_NHD.view(shape)
    else:
        # [K, G, Q, D], keys and values shared by the G heads without a copy.
        q = q_NHD.view(shape).permute(1, 2, 0, 3)
        keys, values = (x[0, :, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    if softcap is None and sinks_H is None:
        out = _flash(q, keys, values, group, scale=scale)
    else:
        out = _plain(q, keys, values, group, scale=scale, softcap=softcap, sinks_H=sinks_H)
    if group.num_queries > 1:
        out = out.permute(2, 0, 1, 3)
    return out.reshape(num_tokens, num_heads, head_dim)


def _flash(q: Tensor, keys: Tensor, values: Tensor, group: Group, *, scale: float) -> Tensor:
    if group.num_queries > 1 and group.is_prompt:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask(q.dtype), scale=scale)


def _plain(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    *,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    keys_T, values, mask = keys.float().mT, values.float(), group.mask(torch.float32)
    is_chunk = group.num_queries > 1
    sinks = None
    if sinks_H is not None:
        sinks = sinks_H.float().view((keys.shape[0], -1, 1, 1) if is_chunk else (1, keys.shape[1], -1, 1))
    tiles = []
    for start in range(0, q.shape[2], _TILE):
        scores = (q[:, :, start : start + _TILE].float() @ keys_T).mul_(scale)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores += mask[start : start + _TILE] if is_chunk else mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
        weights = scores.softmax(-1)
        tiles.append(weights[..., : values.shape[-2]] @ values)
    return torch.cat(tiles, dim=2).to(q.dtype)


def _first_block(start: int, *, window: int | None, block_size: int) -> int:
    """The first block that a query at position `start`, or after it, can see."""
    return 0 if window is None else max(0, start - window + 1) // block_size


def _tokens(batch: Batch, works: Seq[int]) -> slice | Tensor:
    """Which rows of the step's tokens these works are."""
    if works[0] >= batch.num_decodes:
        start = batch.num_decodes + sum(batch.query_lens[batch.num_decodes : works[0]])
        return slice(start, start + batch.query_lens[works[0]])
    if len(works) == batch.num_decodes:
        return slice(0, len(works))
    return torch.tensor(works, device=batch.block_tables.device)


def _blocks(batch: Batch, cache: KVCache, works: Seq[int], *, firsts: Seq[int], num_blocks: int) -> Tensor:
    """The blocks of each sequence. A shorter sequence's last block stands for those that it does not have."""
    device = batch.block_tables.device
    if works[-1] - works[0] == len(works) - 1:
        rows_S = batch.table_rows_S[works[0] : works[-1] + 1]
    else:
        rows_S = batch.table_rows_S[torch.tensor(works, device=device)]
    lasts = [-(-batch.kv_lens[work] // cache.block_size) - 1 for work in works]
    if any(firsts) or min(lasts) < max(lasts):
        columns = torch.tensor(firsts, device=device)[:, None] + torch.arange(num_blocks, device=device)
        columns = columns.minimum(torch.tensor(lasts, device=device)[:, None])
        tables_SB = batch.block_tables[rows_S[:, None], columns]
    else:
        tables_SB = batch.block_tables[:, :num_blocks].index_select(0, rows_S)
    return tables_SB.long()


def _block_rows(cache: KVCache, blocks_SB: Tensor) -> Tensor:
    """Which of a layer's `cache.rows` hold each sequence's keys, then its values: [S, 2, K, B], flat. In this order a
    thread gathers the very sequences that it will attend for."""
    heads_2K = torch.arange(2 * cache.shape.kv_heads, device=blocks_SB.device) * cache.rows_per_head
    return (heads_2K[:, None] + blocks_SB[:, None] * cache.rows_per_block).view(-1)
