"""Attention of a whole step: its decodes by one kernel, its prefill chunks by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels import decode_attention, pages, prefill_attention

if TYPE_CHECKING:
    from services.engine.state import Batch


@dataclass(frozen=True, slots=True)
class Works:
    """Who attends to what. The host knows only the most that there can be, so a captured step may hold any.

    Shapes: D works that may decode, the first of the step; P works that may be chunks of prompts.
    """

    decode_rows_D: Tensor
    """The row in the block tables of each work."""
    decode_lengths_D: Tensor
    """int32: the keys that its token sees; 0 where it does not decode."""
    prefill_rows_P: Tensor
    prefill_lengths_P: Tensor
    """int32: the keys that its last token sees."""
    prefill_counts_P: Tensor
    """int32: its tokens; 0 where it is no chunk."""
    query_starts: Tensor
    """int32, P + 1 of them: where its tokens begin, and where the last one's end."""
    most_prefill: int
    """Tokens of all chunks."""

    @classmethod
    def of(cls, batch: Batch) -> Works:
        """Of a step that the host laid out."""
        split = batch.num_decodes
        starts = batch.query_starts[split:]
        return cls(
            batch.table_rows_S[:split],
            batch.kv_lengths_S[:split],
            batch.table_rows_S[split:],
            batch.kv_lengths_S[split:],
            starts.diff(),
            starts,
            sum(batch.query_lens[split:]),
        )

    @classmethod
    def as_chunks(cls, batch: Batch) -> Works:
        """Of any step, its decodes as chunks of one token."""
        starts, nobody = batch.query_starts, batch.table_rows_S[:0]
        if batch.works is not None and not batch.works.most_prefill:
            starts = torch.arange(batch.num_decodes + 1, dtype=torch.int32, device=nobody.device)
        return cls(
            nobody,
            batch.kv_lengths_S[:0],
            batch.table_rows_S,
            batch.kv_lengths_S,
            starts.diff(),
            starts,
            len(batch.token_ids_N),
        )


class PagedPlan:
    """What the layers of one step share."""

    def __init__(self, batch: Batch, cache: KVCache, *, invariant: bool = False) -> None:
        """Lists the work of the decodes, so that it is long known when the first layer attends. `invariant`: all works go
        through one kernel, which takes keys in the same tiles in the same order for every token, and treats all of them alike."""
        self._invariant = invariant
        self._works = Works.as_chunks(batch) if invariant else batch.works or Works.of(batch)
        self._tables = batch.block_tables
        self._decodes = self._listed_decodes(cache)
        self._scratch: decode_attention.Scratch | None = None
        self._prefill: prefill_attention.Work | None = None
        self._pages: pages.Pages | None = None
        self._out_NHD: Tensor | None = None

    def attend(self, q_NHD: Tensor, cache: KVCache, layer: int, *, scale: float, window: int | None) -> Tensor:
        """As `ops.attention.paged_attention`. Valid until the next layer's."""
        if self._out_NHD is None:
            self._begin(q_NHD, cache)
        assert self._out_NHD is not None
        if self._decodes is not None:
            assert self._scratch is not None
            decode_attention.attend(
                q_NHD, self._out_NHD, cache, layer, self._decodes, self._scratch, scale=scale, window=window
            )
        if self._prefill is not None:
            widened = self._widened(q_NHD, cache, layer) if window is None else None
            prefill_attention.attend(
                q_NHD, self._out_NHD, cache, layer, self._prefill,
                scale=scale, window=window, pages=widened, alike=self._invariant,
            )  # fmt: skip
        return self._out_NHD

    def _listed_decodes(self, cache: KVCache) -> decode_attention.Work | None:
        works, tables = self._works, self._tables
        if not (num_decodes := len(works.decode_rows_D)):
            return None
        longest, kv_heads = tables.shape[1] * cache.block_size, cache.shape.kv_heads
        narrowest = _narrowest(cache)
        chunk = decode_attention.chunk_size(num_decodes, kv_heads, longest, itemsize=narrowest)
        return decode_attention.plan(
            tables,
            works.decode_rows_D,
            works.decode_lengths_D,
            chunk=chunk,
            # Sequences share blocks only as prefixes, so their chunks may be more than the cache holds.
            most_items=decode_attention.most_items(num_decodes, longest, chunk=chunk),
        )

    def _begin(self, q_NHD: Tensor, cache: KVCache) -> None:
        """What all layers share that depends on the shape of the first one's queries."""
        works, tables, heads = self._works, self._tables, q_NHD.shape[1]
        # Rows of a captured step that are nobody's hold what they hold here.
        self._out_NHD = torch.zeros_like(q_NHD) if works.most_prefill else torch.empty_like(q_NHD)
        if self._decodes is not None:
            self._scratch = decode_attention.scratch(self._decodes, heads=heads, cache=cache)
        if works.most_prefill:
            self._prefill = prefill_attention.plan(
                tables,
                works.prefill_rows_P,
                works.prefill_lengths_P,
                works.query_starts,
                works.prefill_counts_P,
                most_tokens=works.most_prefill,
                group=heads // cache.shape.kv_heads,
                tuning=prefill_attention.tuning(q_NHD.dtype, _narrowest(cache)),
            )

    def _widened(self, q_NHD: Tensor, cache: KVCache, layer: int) -> pages.Pages | None:
        """Pages of 8 bits in those of the queries, where they have 16. Never where all works are treated alike: whether there is room for a
        chunk's depends on those beside it."""
        works = self._works
        if self._invariant or cache.layers[layer].scales is None or q_NHD.dtype.itemsize != 2:
            return None
        if self._pages is None:
            self._pages = pages.plan(
                self._tables,
                works.prefill_rows_P,
                works.prefill_lengths_P,
                works.prefill_counts_P,
                most_tokens=works.most_prefill,
                cache=cache,
                dtype=q_NHD.dtype,
            )
        if self._pages is not None:
            pages.widen(cache, layer, self._pages)
        return self._pages


def _narrowest(cache: KVCache) -> int:
    """Bytes of a number of the layer that has the fewest."""
    return min(layer.kv.itemsize for layer in cache.layers)
