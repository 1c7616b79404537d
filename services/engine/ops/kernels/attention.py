"""Attention of a whole step: its decodes by one kernel, its prefill chunks by another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels import decode_attention, prefill_attention

if TYPE_CHECKING:
    from services.engine.state import Batch


class PagedPlan:
    """What the layers of one step share. The host's lists are asked only for prefill, so a step of decodes alone can be
    captured."""

    def __init__(self, batch: Batch, cache: KVCache) -> None:
        tables, num_decodes, num_works = batch.block_tables, batch.num_decodes, len(batch.table_rows_S)
        rows_S, lengths_S = batch.table_rows_S, batch.kv_lengths_S
        self._tables = tables
        self._decodes: decode_attention.Work | None = None
        self._scratch: decode_attention.Scratch | None = None
        if num_decodes:
            chunk = decode_attention.chunk_size(num_decodes, tables.shape[1] * cache.block_size)
            # Sequences share blocks only as prefixes, so their chunks may be more than the cache holds.
            most = num_decodes * -(-tables.shape[1] * cache.block_size // chunk)
            self._decodes = decode_attention.plan(
                tables, rows_S[:num_decodes], lengths_S[:num_decodes], chunk=chunk, most_items=most
            )
        if num_works > num_decodes:
            self._rows_P, self._lengths_P = rows_S[num_decodes:], lengths_S[num_decodes:]
            self._starts = batch.query_starts[num_decodes:]
            self._max_query = max(batch.query_lens[num_decodes:])
        self._has_prefill = num_works > num_decodes

    def attend(self, q_NHD: Tensor, cache: KVCache, layer: int, *, scale: float, window: int | None) -> Tensor:
        """As `ops.attention.paged_attention`."""
        out_NHD = torch.empty_like(q_NHD)
        if self._decodes is not None:
            if self._scratch is None:
                self._scratch = decode_attention.scratch(self._decodes, heads=q_NHD.shape[1], cache=cache)
            decode_attention.attend(
                q_NHD, out_NHD, cache, layer, self._decodes, self._scratch, scale=scale, window=window
            )
        if self._has_prefill:
            prefill_attention.attend(
                q_NHD,
                out_NHD,
                cache,
                layer,
                tables=self._tables,
                slots_S=self._rows_P,
                lengths_S=self._lengths_P,
                query_starts=self._starts,
                max_query=self._max_query,
                scale=scale,
                window=window,
            )
        return out_NHD
