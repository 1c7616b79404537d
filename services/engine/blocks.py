"""The accounts of the KV cache's blocks: who holds which, and which prefix each of them completes.

A block is always in exactly one of three places, so free + active + cached = total:

    free ──allocate──> active ──release, hash known──> cached ──share──> active
      ^                   │                               │
      └──release, no hash─┘ <────allocate (evicts)────────┘

* **free**: holds nothing worth keeping.
* **active**: somebody holds a reference: sequences that read or fill it, or the store's client while it saves it.
* **cached**: nobody holds it, but its content is known by its hash; it is given away when nothing is free, the one
  longest unused first.

A block is named by the chained hash of all tokens up to its end. A block that has a hash is full and never written
again, so any number of sequences may share it.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

HASH_BYTES = 16
"""A collision would serve one prompt the keys of another: 128 bits of SHA-256 make that as hard as it needs to be."""


def root_hash(salt: bytes) -> bytes:
    """The parent of every first block. `salt` names all that keys and values depend on beside the tokens."""
    return sha256(salt).digest()[:HASH_BYTES]


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block: of everything before it (`parent`) and of its own tokens."""
    return sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()[:HASH_BYTES]


class BlockPool:
    """All blocks of one KV cache."""

    def __init__(self, num_blocks: int, *, block_size: int, salt: bytes = b"", keeps_prefixes: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.root = root_hash(salt)
        self.keeps_prefixes = keeps_prefixes
        """Whether blocks are found again by their content. If not, nothing is ever cached."""
        self._num_references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._free = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_active(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def num_references(self, block: int) -> int:
        return self._num_references[block]

    def hash_of(self, block: int) -> bytes | None:
        return self._hashes[block]

    def holds(self, block_hash: bytes) -> bool:
        """Whether a block of this hash is active or cached."""
        return block_hash in self._blocks

    def allocate(self, count: int) -> list[int]:
        """Blocks to fill, each with one reference. What they held is forgotten. There must be so many available."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_references[block] = 1
        return blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of `hashes` that is held. Takes no reference: `share` does."""
        blocks = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these are cached: sharing them leaves so many fewer available."""
        return sum(block in self._cached for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each of these active or cached blocks."""
        for block in blocks:
            assert self._num_references[block] or block in self._cached, f"block {block} is free"
            self._cached.pop(block, None)
            self._num_references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each of a prefix's blocks. The last ones are evicted first: a prefix without its
        end can be used, an end without its prefix cannot."""
        for block in reversed(blocks):
            assert self._num_references[block] > 0, f"block {block} is released twice"
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._retire(block)

    def register(self, block: int, block_hash: bytes) -> bool:
        """Says that an active block is full and what it holds. False where another block holds the same already, or
        prefixes are not kept: then this one stays nameless."""
        assert self._num_references[block] > 0, f"block {block} is nobody's"
        assert self._hashes[block] is None, f"block {block} has a hash: it must not have been written"
        if not self.keeps_prefixes or block_hash in self._blocks:
            return False
        self._hashes[block] = block_hash
        self._blocks[block_hash] = block
        return True

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes the names of active blocks: what they hold is of no use. Who shares them keeps them."""
        for block in blocks:
            assert self._num_references[block] > 0, f"block {block} is nobody's"
            block_hash, self._hashes[block] = self._hashes[block], None
            if block_hash is not None:
                del self._blocks[block_hash]

    def _retire(self, block: int) -> None:
        if self._hashes[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._blocks[block_hash]
        self._hashes[block] = None
        return block
