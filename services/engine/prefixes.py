"""Sequences and the prefix cache: which blocks a sequence finds there, and which of its own others will find.

A hit never covers the last known token: its logits are what the next token is sampled from. What the smaller copy of
the weights computed is found by no other sequence.
"""

from __future__ import annotations

from services.engine.blocks import BlockPool, chain_hash
from services.engine.sequence import Sequence


class Prefixes:
    """The hashes of sequences' blocks, looked up and registered in the pool."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def cached(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest prefix that is held and leaves something to compute."""
        return self._pool.match(self._usable_hashes(sequence)) if self._pool.keeps_prefixes else []

    def hashes_beyond(self, sequence: Sequence) -> list[bytes]:
        """The chained hashes of the full blocks that would save work and that are not held, first one first."""
        if not self._pool.keeps_prefixes:
            return []
        hashes = self._usable_hashes(sequence)
        return hashes[len(self._pool.match(hashes)) :]

    def register(self, sequence: Sequence, start: int, end: int) -> None:
        """Its tokens [start, end) are computed now: the blocks that are full with them may be found."""
        first_full, end_full = start // self._pool.block_size, end // self._pool.block_size
        if self._pool.keeps_prefixes and end_full > first_full and not sequence.was_economical:
            hashes = self._hashes(sequence, end_full)
            for index in range(first_full, end_full):
                if self._pool.register(sequence.blocks[index], hashes[index]):
                    sequence.newly_full.append(index)

    def take_newly_full(self, sequence: Sequence) -> list[tuple[int, bytes, bytes]]:
        """Of its blocks that others find since this was last asked: the block, its hash, and that of the one before it
        (empty for a first one)."""
        newly_full, sequence.newly_full = sequence.newly_full, []
        blocks, hashes = sequence.blocks, sequence.block_hashes
        return [(blocks[index], hashes[index], hashes[index - 1] if index else b"") for index in newly_full]

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        return self._hashes(sequence, (sequence.num_known - 1) // self._pool.block_size)

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """The chained hashes of its first `count` blocks."""
        hashes, size = sequence.block_hashes, self._pool.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else self._pool.root
            hashes.append(chain_hash(parent, sequence.token_ids(start, start + size)))
        return hashes[:count]
