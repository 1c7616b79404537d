"""The blocks, and who goes when room is needed: the one least recently used, and never before the blocks after it.

All blocks stand in one line, from the oldest to the newest. The rule of the line:

    every block stands nearer to the new end than the blocks that follow it in any prefix

so the oldest block is always a leaf, and dropping it leaves no block without its parent. Two moves keep the rule:
a new block goes right behind its parent (at the new end if it has none), and a use moves a block and all its ancestors
to the new end, the block first and the root last:

    old | x   a1   b   a0 | new        a0 is the parent of a1 and of b
    old | x   a1   c   b   a0 | new    c put, whose parent is b
    old | x   c   b   a1   a0 | new    a1 used
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK_OVERHEAD_BYTES = 500
"""What a block costs in memory beside its data, about."""


class _Key(NamedTuple):
    namespace: bytes
    hash: bytes


@dataclass(slots=True, eq=False)
class _Block:
    """A block and its place in the line."""

    key: _Key
    data: bytes
    parent: _Block | None = None
    older: _Block = field(init=False, repr=False)
    newer: _Block = field(init=False, repr=False)

    @property
    def num_bytes(self) -> int:
        return len(self.data) + BLOCK_OVERHEAD_BYTES


class BlockStore:
    """Blocks in at most `capacity_bytes` of memory. `on_evict` is called for each block that has to go."""

    def __init__(self, capacity_bytes: int, *, on_evict: Callable[[], None] = lambda: None) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._on_evict = on_evict
        self._blocks: dict[_Key, _Block] = {}
        # Both ends of the line: `newer` of it is the oldest block, `older` of it the newest.
        self._ends = _Block(_Key(b"", b""), b"")
        self._ends.older = self._ends.newer = self._ends

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def max_data_bytes(self) -> int:
        """The largest block that an empty store has room for."""
        return self.capacity_bytes - BLOCK_OVERHEAD_BYTES

    def count(self, namespace: bytes, hashes: Sequence[bytes]) -> int:
        """How many leading hashes are held. Counts as a use of them."""
        found: _Block | None = None
        number = 0
        for block_hash in hashes:
            block = self._blocks.get(_Key(namespace, block_hash))
            if block is None:
                break
            found, number = block, number + 1
        if found is not None:
            self._use(found)
        return number

    def get(self, namespace: bytes, block_hash: bytes) -> bytes | None:
        """The data of a block, as it was put. Does not count as a use."""
        block = self._blocks.get(_Key(namespace, block_hash))
        return None if block is None else block.data

    def put(self, namespace: bytes, block_hash: bytes, data: bytes, *, parent: bytes) -> bool:
        """Keeps a block; `parent` is the hash of the block before it, empty for the first of a prefix. Whether the block
        is held now: it is not where its parent is not, or where it has room only in the place of its parent. A block
        that is held already keeps its data: a hash names what it says."""
        assert len(data) <= self.max_data_bytes, "the caller checks the size"
        key = _Key(namespace, block_hash)
        if key in self._blocks:
            return True
        before = self._blocks.get(_Key(namespace, parent)) if parent else None
        if parent and before is None:
            return False
        block = _Block(key, data, before)
        while self.num_bytes + block.num_bytes > self.capacity_bytes:
            if self._ends.newer is before:  # an ancestor is the oldest only if it is the parent
                return False
            self._evict(self._ends.newer)
        self._blocks[key] = block
        self.num_bytes += block.num_bytes
        self._insert(block, behind=self._ends if before is None else before)
        return True

    def _use(self, block: _Block) -> None:
        next_block: _Block | None = block
        while next_block is not None:
            _remove(next_block)
            self._insert(next_block, behind=self._ends)
            next_block = next_block.parent

    def _insert(self, block: _Block, *, behind: _Block) -> None:
        """Puts a block into the line, as the next older one than another."""
        block.older, block.newer = behind.older, behind
        block.older.newer = block.newer.older = block

    def _evict(self, block: _Block) -> None:
        _remove(block)
        del self._blocks[block.key]
        self.num_bytes -= block.num_bytes
        self._on_evict()


def _remove(block: _Block) -> None:
    """Takes a block out of the line."""
    block.older.newer, block.newer.older = block.newer, block.older
