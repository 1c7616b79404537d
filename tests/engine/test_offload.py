"""Prefixes beyond the engine's own cache."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import grpc
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from holdfast import rpc, topics
from holdfast.memory import MemoryBus
from holdfast.v1 import kvstore_pb2 as pb
from holdfast.v1 import kvstore_pb2_grpc
from services.engine.__main__ import EngineAddresses
from services.engine.blocks import BlockPool
from services.engine.loop import StepLoop
from services.engine.metrics import EngineMetrics
from services.engine.offload import Fetched, FullBlock, StoreClient
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import FinishReason, News, Sequence
from services.kvstore.__main__ import serve as serve_store
from services.kvstore.settings import KVStoreSettings
from tests.engine.driver import sequence
from tests.engine.engines import until
from tests.engine.fake_runner import FakeRunner, Launched, expected_output
from tests.engine.records import answers, publish
from tests.engine.test_end_to_end import engine, story

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


class FakeCache:
    """The contents of the fake runner's blocks, as bytes."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner

    def read_block(self, block: int) -> bytes:
        size = self._runner.pool.block_size
        return pickle.dumps([self._runner.cache[block, offset] for offset in range(size)])

    def write_block(self, block: int, content: bytes) -> None:
        if content == b"garbage":
            raise ValueError("a block has another length")
        for offset, entry in enumerate(pickle.loads(content)):
            self._runner.cache[block, offset] = entry


class Shelf:
    """A store in this process, that several engines share. It can be held, and made to send garbage."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.cache: FakeCache | None = None
        self.asked: list[tuple[int, float | None]] = []
        """Of each fetch: how many blocks, and within what time."""
        self.waiting: list[Callable[[], None]] = []
        self.holds_fetches = False
        self.keeps_blocks_held = False
        self.sends_garbage = False
        self.num_saved = 0

    def fetch(self, hashes: Seq[bytes], *, within: float | None, done: Callable[[Fetched], None]) -> None:
        self.asked.append((len(hashes), within))
        found: list[tuple[bytes, bytes]] = []
        for block_hash in hashes:
            if block_hash not in self.blocks:
                break
            found.append((block_hash, b"garbage" if self.sends_garbage else self.blocks[block_hash]))
        if self.holds_fetches:
            self.waiting.append(lambda: done(found))
        else:
            done(found)

    def save(self, blocks: Seq[FullBlock], *, done: Callable[[Seq[FullBlock]], None]) -> None:
        assert self.cache is not None
        for each in blocks:
            assert each.parent == b"" or each.parent in self.blocks
            self.blocks[each.block_hash] = self.cache.read_block(each.block)
            self.num_saved += 1
        if not self.keeps_blocks_held:
            done(blocks)


@dataclass
class Running:
    loop: StepLoop[Launched]
    scheduler: Scheduler
    pool: BlockPool
    ended: set[Sequence]

    async def answer(self, each: Sequence) -> list[int]:
        self.loop.add([each])
        await until(lambda: each in self.ended)
        return each.output_ids


@asynccontextmanager
async def running(shelf: Shelf, *, num_blocks: int = 64) -> AsyncIterator[Running]:
    """An engine's step thread with a new, empty cache."""
    pool = BlockPool(num_blocks, block_size=4, salt=b"model")
    runner = FakeRunner(pool)
    shelf.cache = FakeCache(runner)
    scheduler = Scheduler(pool, Limits(max_sequences=4, max_step_tokens=16))
    ended: set[Sequence] = set()

    def deliver(news: list[News]) -> None:
        ended.update(each.sequence for each in news if each.finish is not None)
        loop.told()

    metrics = EngineMetrics(CollectorRegistry())
    loop = StepLoop(scheduler, runner, deliver=deliver, metrics=metrics, store=(shelf, shelf.cache))
    async with loop.running():
        yield Running(loop, scheduler, pool, ended)


async def test_what_one_engine_computed_another_one_fetches() -> None:
    """Full blocks are saved, prompt and answer alike; an engine that holds none of them computes only the rest."""
    shelf = Shelf()
    async with running(shelf) as first:
        answer = await first.answer(sequence(PROMPT, max_tokens=9))
        await until(lambda: shelf.num_saved == 4)
    async with running(shelf) as second:
        again = sequence(PROMPT, max_tokens=9)
        assert await second.answer(again) == answer == expected_output(PROMPT, again.stop)
        assert again.num_cached == 8
        assert second.scheduler.totals.num_prefill_tokens == 2
        next_turn = sequence([*PROMPT, *answer, 7])
        await second.answer(next_turn)
        assert next_turn.num_cached == 16


async def test_what_the_engine_holds_is_not_asked_for() -> None:
    """Only what lies beyond the local prefix is looked for, and nothing where nothing would be saved."""
    shelf = Shelf()
    async with running(shelf) as one:
        await one.answer(sequence(PROMPT))
        await one.answer(sequence(PROMPT))
        await one.answer(sequence([1, 2, 3]))
        await one.answer(sequence([*PROMPT, 1, 2, 3, 4, 5, 6, 7]))
        assert [count for count, _ in shelf.asked] == [2, 2]


async def test_others_run_while_blocks_are_fetched() -> None:
    """A sequence that waits for the store holds up nobody, and may be cancelled meanwhile."""
    shelf = Shelf()
    async with running(shelf) as one:
        shelf.holds_fetches = True
        waits, leaves = sequence(PROMPT), sequence([9] * 10)
        one.loop.add([waits, leaves])
        await until(lambda: len(shelf.waiting) == 2)
        other = sequence([1, 2, 3])
        await one.answer(other)
        assert not waits.is_finished
        one.loop.cancel([leaves])
        await until(lambda: leaves in one.ended)
        for answer in shelf.waiting:
            answer()
        await until(lambda: waits in one.ended)
        assert waits.output_ids == expected_output(PROMPT, waits.stop)
        assert leaves.finish is FinishReason.CANCELLED


async def test_what_the_store_sends_wrong_is_computed() -> None:
    """Bytes that are no block of ours are refused; the answer is the same."""
    shelf = Shelf()
    async with running(shelf) as first:
        await first.answer(sequence(PROMPT))
        await until(lambda: shelf.num_saved >= 2)
    shelf.sends_garbage = True
    async with running(shelf) as second:
        again = sequence(PROMPT)
        assert await second.answer(again) == expected_output(PROMPT, again.stop)
        assert again.num_cached == 0
        await until(lambda: second.pool.num_active == 0)  # its own blocks are saved first


async def test_a_slow_store_does_not_hold_the_cache_hostage() -> None:
    """At most an eighth of the blocks is held for the store; what becomes full meanwhile is not saved."""
    shelf = Shelf()
    async with running(shelf, num_blocks=32) as one:
        shelf.keeps_blocks_held = True
        for first_id in range(5):
            await one.answer(sequence([first_id] * 21, max_tokens=2))
        assert shelf.num_saved == 4
        assert one.pool.num_active == 4


async def test_a_full_cache_takes_what_fits() -> None:
    """Where more is fetched than the pool can give, the rest is computed."""
    shelf = Shelf()
    long = [1, 2] * 12
    async with running(shelf) as first:
        await first.answer(sequence(long))
        await until(lambda: shelf.num_saved >= 6)
    async with running(shelf, num_blocks=7) as second:
        again = sequence(long, max_tokens=3)
        assert await second.answer(again) == expected_output(long, again.stop)


# With the store as a service.


@asynccontextmanager
async def store_address() -> AsyncIterator[str]:
    async with serve_store(KVStoreSettings(address="127.0.0.1:0", capacity_bytes=1 << 26)) as addresses:
        yield addresses.address


class Bytes:
    """A cache whose blocks have set contents."""

    def read_block(self, block: int) -> bytes:
        return bytes([block]) * 1000

    def write_block(self, block: int, content: bytes) -> None:
        raise AssertionError("not written here")


@asynccontextmanager
async def client(address: str, namespace: bytes = b"n") -> AsyncIterator[tuple[StoreClient, CollectorRegistry]]:
    registry = CollectorRegistry()
    made = StoreClient(address, Bytes(), namespace=namespace, metrics=EngineMetrics(registry))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.run())
        yield made, registry
        running.cancel()


async def fetched(store: StoreClient, hashes: list[bytes], *, within: float | None = None) -> Fetched:
    answer: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
    store.fetch(hashes, within=within, done=answer.set_result)
    return await asyncio.wait_for(answer, 20)


async def saved(store: StoreClient, blocks: list[FullBlock]) -> None:
    answer: asyncio.Future[Seq[FullBlock]] = asyncio.get_running_loop().create_future()
    store.save(blocks, done=answer.set_result)
    assert await asyncio.wait_for(answer, 20) == blocks


HASHES = [bytes([number]) * 16 for number in range(3)]
BLOCKS = [FullBlock(number, HASHES[number], HASHES[number - 1] if number else b"") for number in range(3)]


async def test_the_service_gives_back_what_was_saved() -> None:
    """The leading blocks that it holds, in order, and only within the namespace."""
    async with store_address() as address, client(address) as (store, registry), client(address, b"m") as (other, _):
        assert await fetched(store, HASHES) == []
        await saved(store, BLOCKS[:2])
        assert await fetched(store, HASHES) == [(HASHES[number], bytes([number]) * 1000) for number in range(2)]
        assert await fetched(other, HASHES) == []
        assert registry.get_sample_value("holdfast_store_blocks_fetched_total") == 2
        assert registry.get_sample_value("holdfast_store_blocks_saved_total") == 2
        assert registry.get_sample_value("holdfast_store_failures_total") == 0


async def test_a_store_that_is_gone_is_counted_and_nothing_else() -> None:
    """Fetches end with nothing, saves let the blocks go."""
    async with store_address() as address:
        pass
    async with client(address) as (store, registry):
        assert await fetched(store, HASHES, within=0.2) == []
        await saved(store, BLOCKS)
        assert registry.get_sample_value("holdfast_store_failures_total") == 2


async def test_a_fetch_ends_with_what_came_in_time() -> None:
    """A store that sends one block and then hangs costs the time that was allowed, and the block counts."""

    class Hanging(kvstore_pb2_grpc.KVStoreServiceServicer):
        async def Lookup(self, request: pb.LookupRequest, context: grpc.aio.ServicerContext) -> pb.LookupResponse:  # type: ignore[type-arg,override]
            return pb.LookupResponse(num_blocks=len(request.hashes))

        async def Fetch(self, request: pb.FetchRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.FetchResponse]:  # type: ignore[type-arg,override] # fmt: skip
            yield pb.FetchResponse(hash=request.hashes[0], data=b"one")
            await asyncio.Event().wait()

    add = kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server
    servicer = rpc.Servicer("holdfast.v1.KVStoreService", lambda server: add(Hanging(), server))
    async with rpc.serving("127.0.0.1:0", [servicer], drain=0) as server, client(server.address) as (store, _):
        assert await fetched(store, HASHES, within=0.5) == [(HASHES[0], b"one")]


async def metric(addresses: EngineAddresses, name: str) -> float:
    with await asyncio.to_thread(urlopen, f"http://127.0.0.1:{addresses.metrics_port}/metrics") as page:
        lines: list[str] = page.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"holdfast_{name} "))


async def test_a_trained_model_goes_on_from_fetched_blocks_in_8_bits(stories260k: Path) -> None:
    """Blocks of mixed formats travel; an engine whose layers are kept otherwise does not find them."""
    async with MemoryBus() as bus, store_address() as address:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard:
            for request_id, rules in (("first", "0=auto,int8"), ("second", "0=auto,int8"), ("third", "int8")):
                settings = {"kvstore": address, "metrics_address": "127.0.0.1:0", "kv_cache_dtype": rules}
                async with engine(bus, stories260k, **settings) as addresses:
                    await publish(bus, story(request_id, list(range(1, 102)), max_tokens=20))
                    await heard.finished(request_id)
                    while request_id == "first" and await metric(addresses, "store_blocks_saved_total") < 7:
                        pass
            cached = {each: heard[each].finish for each in ("first", "second", "third")}
            assert [finish and finish.usage.cached_tokens for finish in cached.values()] == [0, 96, 0]
            assert heard["second"].token_ids == heard["first"].token_ids


async def test_a_trained_model_goes_on_from_fetched_blocks(stories260k: Path) -> None:
    """A second engine, started after the first one left, computes nothing of the blocks that the store has, and writes
    the published text all the same."""
    text = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    published = list(tokenizer.encode(text, add_special_tokens=False).ids)
    prompt_ids = [1, *published[:100]]
    async with MemoryBus() as bus, store_address() as address:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard:
            for request_id in ("first", "second"):
                settings = {
                    "kvstore": address,
                    "cache_blocks": 64,
                    "max_model_len": 512,
                    "metrics_address": "127.0.0.1:0",
                }
                async with engine(bus, stories260k, **settings) as addresses:
                    await publish(bus, story(request_id, prompt_ids, max_tokens=40))
                    await heard.finished(request_id)
                    while request_id == "first" and await metric(addresses, "store_blocks_saved_total") < 8:
                        pass
                assert heard[request_id].token_ids == published[100:140]
            assert heard["first"].finish is not None
            assert heard["second"].finish is not None
            assert heard["first"].finish.usage.cached_tokens == 0
            assert heard["second"].finish.usage.cached_tokens == 96
