"""The store's accounts: what is held, in what order it goes, and that no prefix has a hole."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvstore.store import BLOCK_OVERHEAD_BYTES, BlockStore

SIZE = 100
ROOM = SIZE + BLOCK_OVERHEAD_BYTES


def store_for(num_blocks: int) -> BlockStore:
    return BlockStore(num_blocks * ROOM)


def name(block: str) -> bytes:
    """The hash of a block, named by its whole prefix: "abc" follows "ab"."""
    return block.encode()


def put(store: BlockStore, *blocks: str, namespace: bytes = b"n") -> list[bool]:
    return [store.put(namespace, name(b), name(b).ljust(SIZE, b"."), parent=name(b[:-1])) for b in blocks]


def held(store: BlockStore, *blocks: str, namespace: bytes = b"n") -> list[str]:
    return [b for b in blocks if store.get(namespace, name(b)) is not None]


def test_what_was_put_is_found_by_its_prefix() -> None:
    """count tells how many leading blocks are held, and get gives back the bytes that were put."""
    store = store_for(8)
    assert put(store, "a", "ab", "abc") == [True, True, True]
    assert store.count(b"n", [name("a"), name("ab"), name("abc"), name("abcd")]) == 3
    assert store.count(b"n", [name("x"), name("a")]) == 0
    assert store.get(b"n", name("ab")) == b"ab".ljust(SIZE, b".")
    assert (store.num_blocks, store.num_bytes) == (3, 3 * ROOM)


def test_namespaces_do_not_answer_each_other() -> None:
    """A block is held in the namespace it was put in, and nowhere else."""
    store = store_for(8)
    put(store, "a", namespace=b"one")
    assert store.count(b"two", [name("a")]) == 0
    assert store.get(b"two", name("a")) is None


def test_the_least_recently_used_goes_first() -> None:
    """Where room is needed, the block whose last use is longest ago is dropped."""
    store = store_for(3)
    put(store, "a", "b", "c")
    store.count(b"n", [name("a")])
    put(store, "d")
    assert held(store, "a", "b", "c", "d") == ["a", "c", "d"]


def test_a_prefix_is_dropped_from_its_end() -> None:
    """The last block of an unused prefix goes before the ones it follows, so that what is left can be used."""
    store = store_for(4)
    put(store, "a", "ab", "abc", "x")
    put(store, "y")
    assert held(store, "a", "ab", "abc", "x", "y") == ["a", "ab", "x", "y"]


def test_a_use_of_the_end_keeps_the_whole_prefix() -> None:
    """Using a later block alone counts as a use of those before it: they do not go first."""
    store = store_for(4)
    put(store, "a", "ab", "x", "y")
    store.count(b"n", [name("ab")])
    put(store, "z", "w")
    assert held(store, "a", "ab", "x", "y", "z", "w") == ["a", "ab", "z", "w"]


def test_a_block_without_its_parent_is_not_kept() -> None:
    """No lookup could find it, so it takes no room."""
    store = store_for(4)
    assert put(store, "ab") == [False]
    assert store.num_blocks == 0


def test_a_prefix_longer_than_the_store_keeps_its_beginning() -> None:
    """Blocks that would take the place of their own parents are refused: the beginning stays useful."""
    store = store_for(3)
    put(store, "x")
    assert put(store, "a", "ab", "abc", "abcd") == [True, True, True, False]
    assert held(store, "x", "a", "ab", "abc") == ["a", "ab", "abc"]


def test_what_is_put_again_stays_as_it_is() -> None:
    """A block that is held already is reported as held and takes no more room."""
    store = store_for(2)
    put(store, "a")
    assert store.put(b"n", name("a"), b"other", parent=b"")
    assert store.get(b"n", name("a")) == b"a".ljust(SIZE, b".")
    assert store.num_bytes == ROOM


def test_every_eviction_is_told() -> None:
    """on_evict is called once for each block that goes."""
    evicted: list[None] = []
    store = BlockStore(2 * ROOM, on_evict=lambda: evicted.append(None))
    put(store, "a", "b", "c", "d")
    assert len(evicted) == 2


@dataclass
class Model:
    """What the store should hold, told in the dullest way: a list from the least to the most recently used block."""

    line: list[str] = field(default_factory=list)

    def use(self, block: str) -> None:
        for end in range(len(block), 0, -1):
            self.line.remove(block[:end])
            self.line.append(block[:end])

    def put(self, block: str, room: int) -> bool:
        if block in self.line:
            return True
        parent = block[:-1]
        if parent and parent not in self.line:
            return False
        while len(self.line) >= room:
            if self.line[0] == parent:
                return False
            self.line.pop(0)
        self.line.insert(self.line.index(parent) if parent else len(self.line), block)
        return True


BLOCKS = st.text("ab", min_size=1, max_size=5)


@settings(max_examples=300)
@given(room=st.integers(1, 8), acts=st.lists(st.tuples(st.sampled_from(["put", "use"]), BLOCKS), max_size=60))
def test_any_sequence_keeps_prefixes_whole_and_memory_bounded(room: int, acts: list[tuple[str, str]]) -> None:
    """After any puts and uses the store holds what the model holds, in bounded memory, every block with its parent."""
    store, model = store_for(room), Model()
    for act, block in acts:
        prefix = [block[:end] for end in range(1, len(block) + 1)]
        if act == "put":
            assert put(store, block) == [model.put(block, room)]
        else:
            found = store.count(b"n", [name(b) for b in prefix])
            assert prefix[:found] == [b for b in prefix if b in model.line]
            if found:
                model.use(prefix[found - 1])
        assert store.num_blocks == len(model.line) <= room
        assert store.num_bytes == len(model.line) * ROOM <= store.capacity_bytes
        assert held(store, *model.line) == model.line
        assert all(len(b) == 1 or b[:-1] in model.line for b in model.line)


@pytest.mark.parametrize("size", [0, 1, 99])
def test_blocks_of_all_sizes_are_accounted(size: int) -> None:
    """The account is what the blocks take, whatever their sizes, before and after some went."""
    store = BlockStore(10_000)
    for number in range(50):
        store.put(b"n", b"%d" % number, bytes(size * number), parent=b"")
        sizes = [len(data) for n in range(number + 1) if (data := store.get(b"n", b"%d" % n)) is not None]
        assert store.num_bytes == sum(sizes) + BLOCK_OVERHEAD_BYTES * len(sizes) <= 10_000
