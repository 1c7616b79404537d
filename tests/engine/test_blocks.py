"""The accounts of the KV cache's blocks."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.engine.blocks import BlockPool, chain_hash, root_hash


def pool(num_blocks: int = 4, **options: bool) -> BlockPool:
    return BlockPool(num_blocks, block_size=2, salt=b"model", **options)


def hashes(count: int) -> list[bytes]:
    chain = [root_hash(b"model")]
    for index in range(count):
        chain.append(chain_hash(chain[-1], [index, index]))
    return chain[1:]


def fill(blocks: BlockPool, names: list[bytes]) -> list[int]:
    """Blocks as a sequence leaves them: full, named, nobody's."""
    taken = blocks.allocate(len(names))
    for block, name in zip(taken, names, strict=True):
        blocks.register(block, name)
    blocks.release(taken)
    return taken


def test_a_hash_depends_on_all_tokens_before_and_on_the_salt() -> None:
    """Equal tokens after another prefix, or for another model, give another hash."""
    a, b = root_hash(b"a"), root_hash(b"b")
    assert chain_hash(a, [1, 2]) == chain_hash(a, [1, 2])
    assert len({chain_hash(a, [1, 2]), chain_hash(b, [1, 2]), chain_hash(chain_hash(a, [1, 2]), [1, 2])}) == 3


def test_a_released_block_is_found_by_its_hash_until_it_is_needed() -> None:
    """A cached block is matched and shared; once it is allocated for something else, it is forgotten."""
    blocks, names = pool(), hashes(2)
    filled = fill(blocks, names)
    assert (blocks.num_free, blocks.num_active, blocks.num_cached) == (2, 0, 2)

    assert blocks.match(names) == filled
    blocks.share(filled)
    assert (blocks.num_free, blocks.num_active, blocks.num_cached) == (2, 2, 0)

    blocks.release(filled)
    blocks.allocate(4)
    assert blocks.match(names) == []


def test_a_prefix_is_evicted_from_its_end() -> None:
    """When one block of a cached prefix has to go, it is the last one, so that the rest can still be used."""
    blocks, names = pool(), hashes(4)
    filled = fill(blocks, names)
    blocks.allocate(1)
    assert blocks.match(names) == filled[:3]


def test_the_prefix_longest_unused_is_evicted_first() -> None:
    """Sharing a prefix makes it the newest again."""
    blocks, names = pool(), hashes(4)
    old, new = names[:2], names[2:]
    old_blocks = fill(blocks, old)
    fill(blocks, new)
    blocks.share(old_blocks)
    blocks.release(old_blocks)
    blocks.allocate(2)
    assert blocks.match(old) == old_blocks
    assert blocks.match(new) == []


def test_two_blocks_of_the_same_content_keep_one_name() -> None:
    """Who computes what another computed already keeps a nameless copy, which is free after use."""
    blocks, (name,) = pool(), hashes(1)
    first, second = blocks.allocate(2)
    assert blocks.register(first, name)
    assert not blocks.register(second, name)
    blocks.release([second])
    assert (blocks.num_free, blocks.num_active, blocks.num_cached) == (3, 1, 0)


def test_without_prefixes_nothing_is_cached() -> None:
    """A pool that keeps no prefixes frees every block."""
    blocks = pool(keeps_prefixes=False)
    fill(blocks, hashes(4))
    assert blocks.num_free == 4


class Accounts(RuleBasedStateMachine):
    """Holders come and go in any order; the pool is compared with what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, block_size=2)
        self.names = hashes(8)
        self.held: list[list[int]] = []

    @rule(count=st.integers(1, 3), named=st.booleans(), first=st.integers(0, 5))
    def allocate(self, count: int, named: bool, first: int) -> None:
        if count > self.pool.num_available:
            return
        blocks = self.pool.allocate(count)
        for block, name in zip(blocks, self.names[first : first + count] if named else [], strict=False):
            self.pool.register(block, name)
        self.held.append(blocks)

    @rule(first=st.integers(0, 7))
    def share(self, first: int) -> None:
        blocks = self.pool.match(self.names[first:])
        self.pool.share(blocks)
        self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def references_are_those_held(self) -> None:
        for block in range(6):
            assert self.pool.num_references(block) == sum(holder.count(block) for holder in self.held)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        active = {block for holder in self.held for block in holder}
        assert self.pool.num_active == len(active)
        assert self.pool.num_free + self.pool.num_active + self.pool.num_cached == 6

    @invariant()
    def a_name_belongs_to_one_block(self) -> None:
        for name in self.names:
            for block in self.pool.match([name]):
                assert self.pool.hash_of(block) == name


TestAccounts = Accounts.TestCase
