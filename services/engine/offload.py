"""Prefixes beyond the engine's own cache: blocks fetched from the KV store before a sequence starts, and sent there when
they become full.

No step ever waits for the store. A sequence of whose prefix the store may have more waits itself, in phase LOADING, at
most as long as computing those tokens would take; what came by then is put into the prefix cache, where the sequence
finds it like anything else. A full block is held until it is sent; while too many are held, further ones are not sent.
Every failure means that it is computed, or not kept; it is counted and logged, and nobody else hears of it.

`Offload` is the step thread's side of this, `StoreClient` the event loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import grpc
import structlog

from holdfast import rpc
from holdfast.v1 import kvstore_pb2 as pb
from holdfast.v1 import kvstore_pb2_grpc
from services.engine.metrics import EngineMetrics
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

FETCH_SECONDS = 1.0
"""How long a fetch may take as long as nobody knows how long computing takes."""

SAVE_SECONDS = 30.0
"""How long the store may take to accept what one step filled."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FullBlock:
    """A block that became full, held until it is saved."""

    block: int
    block_hash: bytes
    parent: bytes
    """The hash of the block before it; empty for the first one of a prefix."""


Fetched = Seq[tuple[bytes, bytes]]
"""Hashes and contents of consecutive blocks."""


class Store(Protocol):
    """The store as the event loop sees it. Neither call waits or raises."""

    def fetch(self, hashes: Seq[bytes], *, within: float | None, done: Callable[[Fetched], None]) -> None:
        """Looks for blocks and calls `done` with the leading ones that came, at most `within` seconds from now."""
        ...

    def save(self, blocks: Seq[FullBlock], *, done: Callable[[Seq[FullBlock]], None]) -> None:
        """Saves blocks, and calls `done` when they need not be held any more."""
        ...


class Cache(Protocol):
    """The contents of blocks."""

    def read_block(self, block: int) -> bytes | bytearray:
        """A copy. Called in any thread, for blocks that nobody writes."""
        ...

    def write_block(self, block: int, content: bytes) -> None:
        """Fills a block; ValueError where the content is not as long as one. Called in the step thread."""
        ...


class Offload:
    """The step thread's side: what is wanted, what came, what is to be saved."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: Store,
        cache: Cache,
        *,
        ask: Callable[[Callable[[], None]], None],
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        """`ask` runs something in the step thread, `call` in the event loop."""
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._store = store
        self._cache = cache
        self._ask = ask
        self._call = call
        self._held: set[int] = set()
        self._full: list[FullBlock] = []
        scheduler.on_full = self._hold

    @property
    def most_held(self) -> int:
        """Blocks that may be held for the store."""
        return self._pool.num_blocks // 8

    def add(self, sequence: Sequence) -> None:
        """Adds a sequence to the scheduler; where blocks beyond the cache would save it work, it waits for them."""
        wanted = self._scheduler.hashes_beyond_cache(sequence) if sequence.shares_prompt_with is None else []
        self._scheduler.add(sequence, loading=bool(wanted))
        if wanted and not sequence.is_finished:
            tokens = len(wanted) * self._pool.block_size
            within = self._scheduler.pace.seconds(tokens=tokens, kv_tokens=tokens)
            self._call(partial(self._store.fetch, wanted, within=within, done=partial(self._fetched, sequence)))

    def save_full(self) -> None:
        """Sends off the blocks that became full in the step just committed."""
        if self._full:
            full, self._full = self._full, []
            self._call(partial(self._store.save, full, done=self._saved))

    def _fetched(self, sequence: Sequence, fetched: Fetched) -> None:
        self._ask(partial(self._load, sequence, fetched))

    def _saved(self, blocks: Seq[FullBlock]) -> None:
        self._ask(partial(self._let_go, blocks))

    def _load(self, sequence: Sequence, fetched: Fetched) -> None:
        """Puts what came into the prefix cache and lets the sequence run."""
        blocks: list[int] = []
        for block_hash, content in fetched:
            if self._pool.holds(block_hash):
                continue
            if not self._pool.num_available or not self._fill(block_hash, content, blocks):
                break
        self._pool.release(blocks)
        self._scheduler.loaded(sequence)

    def _fill(self, block_hash: bytes, content: bytes, blocks: list[int]) -> bool:
        """Makes a block of it, and adds that to `blocks`. False where the content cannot be one of ours."""
        (block,) = self._pool.allocate(1)
        blocks.append(block)
        try:
            self._cache.write_block(block, content)
        except ValueError as error:
            log.warning("fetched block refused", error=str(error))
            return False
        return self._pool.register(block, block_hash)

    def _hold(self, block: int, block_hash: bytes, parent: bytes) -> None:
        if len(self._held) < self.most_held:
            self._pool.share([block])
            self._held.add(block)
            self._full.append(FullBlock(block, block_hash, parent))

    def _let_go(self, blocks: Seq[FullBlock]) -> None:
        for each in blocks:
            self._held.remove(each.block)
            self._pool.release([each.block])


class StoreClient:
    """The event loop's side: the calls to the store."""

    def __init__(self, address: str, cache: Cache, *, namespace: bytes, metrics: EngineMetrics) -> None:
        """`namespace` names all that the contents of blocks depend on beside the tokens."""
        self._address = address
        self._cache = cache
        self._namespace = namespace
        self._metrics = metrics
        self._fetches: asyncio.Queue[tuple[Seq[bytes], float | None, Callable[[Fetched], None]]] = asyncio.Queue()
        self._saves: asyncio.Queue[tuple[Seq[FullBlock], Callable[[Seq[FullBlock]], None]]] = asyncio.Queue()

    def fetch(self, hashes: Seq[bytes], *, within: float | None, done: Callable[[Fetched], None]) -> None:
        self._fetches.put_nowait((hashes, within, done))

    def save(self, blocks: Seq[FullBlock], *, done: Callable[[Seq[FullBlock]], None]) -> None:
        self._saves.put_nowait((blocks, done))

    async def run(self) -> None:
        """Serves both until it is cancelled. Fetches run side by side, as many as there are sequences that wait; saves
        one after the other, as many as there are blocks held."""
        async with rpc.channel(self._address) as channel, asyncio.TaskGroup() as tasks:
            stub = kvstore_pb2_grpc.KVStoreServiceStub(channel)
            tasks.create_task(self._save_all(stub))
            while True:
                hashes, within, done = await self._fetches.get()
                tasks.create_task(self._fetch(stub, hashes, FETCH_SECONDS if within is None else within, done))

    async def _fetch(
        self,
        stub: kvstore_pb2_grpc.KVStoreServiceAsyncStub,
        hashes: Seq[bytes],
        within: float,
        done: Callable[[Fetched], None],
    ) -> None:
        fetched: list[tuple[bytes, bytes]] = []
        try:
            async with asyncio.timeout(within):
                await self._receive(stub, hashes, fetched)
        except (grpc.RpcError, TimeoutError) as error:
            self._failed("fetch", error)
        self._metrics.blocks_fetched.inc(len(fetched))
        done(fetched)

    async def _receive(
        self, stub: kvstore_pb2_grpc.KVStoreServiceAsyncStub, hashes: Seq[bytes], fetched: list[tuple[bytes, bytes]]
    ) -> None:
        """Appends the blocks as they come, those that lead `hashes`."""
        held = await stub.Lookup(pb.LookupRequest(namespace=self._namespace, hashes=hashes))
        if held.num_blocks == 0:
            return
        wanted = hashes[: held.num_blocks]
        async with rpc.streaming(stub.Fetch(pb.FetchRequest(namespace=self._namespace, hashes=wanted))) as call:
            async for response in call:
                if len(fetched) == len(wanted) or response.hash != wanted[len(fetched)]:
                    log.warning("the store sent another block than was asked for")
                    return
                fetched.append((response.hash, response.data))

    async def _save_all(self, stub: kvstore_pb2_grpc.KVStoreServiceAsyncStub) -> None:
        while True:
            blocks, done = await self._saves.get()
            try:
                kept = await stub.Put(self._puts(blocks), timeout=SAVE_SECONDS)
                self._metrics.blocks_saved.inc(kept.num_kept)
            except grpc.RpcError as error:
                self._failed("save", error)
            done(blocks)

    async def _puts(self, blocks: Seq[FullBlock]) -> AsyncIterator[pb.PutRequest]:
        for each in blocks:
            content = await asyncio.to_thread(self._cache.read_block, each.block)
            yield pb.PutRequest(
                namespace=self._namespace, hash=each.block_hash, parent=each.parent, data=bytes(content)
            )

    def _failed(self, what: str, error: Exception) -> None:
        self._metrics.store_failures.inc()
        reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else "out of time"
        log.warning("the KV store failed", call=what, reason=reason)
