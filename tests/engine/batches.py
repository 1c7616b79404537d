"""Batches made by hand, and sequences run through a model without an engine around it."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.kv_format import KVFormat
from services.engine.models import Model
from services.engine.state import Batch, Selection


@dataclass(slots=True)
class Chunk:
    """Compute these tokens of a sequence, the first of which stands at `start`."""

    token_ids: Seq[int]
    start: int
    table: Seq[int]
    """The blocks of the sequence."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


def batch_of(*chunks: Chunk, block_size: int, sample_all: bool = False) -> Batch:
    """The batch that computes these chunks, decodes first; samples the last row of each, or all rows."""
    positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
    slots = [
        chunk.table[position // block_size] * block_size + position % block_size
        for chunk in chunks
        for position in range(chunk.start, chunk.end)
    ]
    query_lens = [len(chunk.token_ids) for chunk in chunks]
    starts = [sum(query_lens[:index]) for index in range(len(chunks) + 1)]
    rows = list(range(starts[-1])) if sample_all else [start - 1 for start in starts[1:]]
    width = max(len(chunk.table) for chunk in chunks)
    tables = [[*chunk.table, *[0] * (width - len(chunk.table))] for chunk in chunks]
    nobody = torch.zeros(len(rows), dtype=torch.int64)
    return Batch(
        token_ids_N=torch.tensor([token for chunk in chunks for token in chunk.token_ids]),
        positions_N=torch.tensor(positions),
        write_slots_N=torch.tensor(slots),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        table_rows_S=torch.arange(len(chunks)),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        kv_lengths_S=torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32),
        sample_rows_R=torch.tensor(rows),
        selection=Selection([0] * len(rows), [0] * len(rows), nobody, nobody),
        num_decodes=next((index for index, count in enumerate(query_lens) if count != 1), len(chunks)),
        query_lens=query_lens,
        kv_lens=[chunk.end for chunk in chunks],
    )


def fill(cache: KVCache, *, seed: int = 0) -> None:
    """Writes noise wherever a token can be."""
    shape, num_slots = cache.shape, cache.num_blocks * cache.block_size
    draw = torch.Generator().manual_seed(seed)
    slots = cache.locate(torch.arange(num_slots, device=cache.data.device))
    for layer in range(shape.layers):
        noise = torch.randn((num_slots, 2, shape.kv_heads, shape.head_dim), generator=draw)
        cache.write(layer, noise.to(cache.data.device, shape.dtype), slots)


@dataclass(slots=True)
class Bench:
    """A model, a cache, and blocks handed out in a shuffled order."""

    model: Model
    block_size: int = 16
    num_blocks: int = 64
    formats: Seq[KVFormat] | None = None
    cache: KVCache = field(init=False)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = KVCache(
            self.model.kv_shape, num_blocks=self.num_blocks, block_size=self.block_size, formats=self.formats
        )
        self._free = list(range(self.num_blocks))
        random.Random(0).shuffle(self._free)

    def table(self, num_tokens: int) -> list[int]:
        """Blocks for a sequence of so many tokens."""
        return [self._free.pop() for _ in range(-(-num_tokens // self.block_size))]

    def forward(self, *chunks: Chunk, sample_all: bool = False) -> Tensor:
        return self.model.forward(batch_of(*chunks, block_size=self.block_size, sample_all=sample_all), self.cache)

    def logits(self, token_ids: Seq[int], *, chunks: Seq[int] | None = None) -> Tensor:
        """The logits of every position of a new sequence, computed in chunks of these lengths."""
        table, start, parts = self.table(len(token_ids)), 0, []
        for count in chunks or [len(token_ids)]:
            parts.append(self.forward(Chunk(token_ids[start : start + count], start, table), sample_all=True))
            start += count
        assert start == len(token_ids)
        return torch.cat(parts)

    def greedy(self, prompt_ids: Seq[int], num_tokens: int) -> tuple[list[int], Tensor]:
        """The likeliest continuation, one decode step at a time, and the logits that it was chosen from."""
        ids, table = list(prompt_ids), self.table(len(prompt_ids) + num_tokens)
        rows = [self.forward(Chunk(ids, 0, table))]
        for _ in range(num_tokens - 1):
            ids.append(int(rows[-1].argmax()))
            rows.append(self.forward(Chunk(ids[-1:], len(ids) - 1, table)))
        logits = torch.cat(rows)
        return logits.argmax(-1).tolist(), logits
