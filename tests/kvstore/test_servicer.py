"""The KV store over real sockets."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdfast import rpc
from holdfast.errors import ConfigurationError, InvalidRequest, from_rpc_error
from holdfast.v1 import kvstore_pb2 as pb
from holdfast.v1.kvstore_pb2_grpc import KVStoreServiceStub
from services.kvstore.__main__ import KVStoreAddresses, serve
from services.kvstore.settings import KVStoreSettings

if TYPE_CHECKING:
    from holdfast.v1.kvstore_pb2_grpc import KVStoreServiceAsyncStub

CAPACITY = 1 << 20
NAMESPACE = b"model bf16 32"
HASHES = [bytes([number]) * 16 for number in range(1, 9)]


@pytest.fixture
async def addresses() -> AsyncIterator[KVStoreAddresses]:
    settings = KVStoreSettings(address="127.0.0.1:0", metrics_address="127.0.0.1:0", capacity_bytes=CAPACITY)
    async with serve(settings) as running:
        yield running


@pytest.fixture
async def store(addresses: KVStoreAddresses) -> AsyncIterator[KVStoreServiceAsyncStub]:
    async with rpc.channel(addresses.address) as channel:
        yield KVStoreServiceStub(channel)


def block(number: int, *, size: int = 1000, namespace: bytes = NAMESPACE, **other: bytes) -> pb.PutRequest:
    """The block of this number in one long prefix."""
    fields = {"hash": HASHES[number], "parent": HASHES[number - 1] if number else b"", "data": bytes([number]) * size}
    return pb.PutRequest(namespace=namespace, **{**fields, **other})


async def put(store: KVStoreServiceAsyncStub, requests: Iterable[pb.PutRequest]) -> int:
    return (await store.Put(iter(requests))).num_kept


async def fetch(store: KVStoreServiceAsyncStub, hashes: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    call = store.Fetch(pb.FetchRequest(namespace=NAMESPACE, hashes=hashes))
    return [(response.hash, response.data) async for response in call]


async def test_blocks_come_back_as_they_were_put(store: KVStoreServiceAsyncStub) -> None:
    """Lookup counts what Put kept, and Fetch gives it back in the order asked, up to the first that is missing."""
    assert await put(store, [block(0), block(1), block(2)]) == 3
    asked = [*HASHES[:3], HASHES[7], HASHES[0]]
    assert (await store.Lookup(pb.LookupRequest(namespace=NAMESPACE, hashes=asked))).num_blocks == 3
    assert await fetch(store, asked) == [(HASHES[n], bytes([n]) * 1000) for n in range(3)]
    assert await fetch(store, [HASHES[7]]) == []


async def test_namespaces_are_apart(store: KVStoreServiceAsyncStub) -> None:
    """Blocks of one namespace never answer another."""
    await put(store, [block(0, namespace=b"other")])
    assert (await store.Lookup(pb.LookupRequest(namespace=NAMESPACE, hashes=HASHES[:1]))).num_blocks == 0


async def test_a_prefix_goes_on_in_a_later_call(store: KVStoreServiceAsyncStub) -> None:
    """A call may begin after blocks that an earlier one put, and what is held counts as kept."""
    assert await put(store, [block(0), block(1)]) == 2
    assert await put(store, [block(1), block(2), block(5)]) == 2
    assert len(await fetch(store, HASHES)) == 3


async def test_a_prefix_that_is_put_to_stays(store: KVStoreServiceAsyncStub) -> None:
    """Blocks put behind an old prefix do not drive out that prefix, but what is older in use."""
    third = CAPACITY // 3 - 1000
    await put(store, [block(0, size=third)])
    await put(store, [block(7, size=third, parent=b"")])
    await put(store, [block(1, size=third), block(2, size=third)])
    assert [number for number, _ in await fetch(store, HASHES[:3])] == HASHES[:3]
    assert await fetch(store, [HASHES[7]]) == []


async def test_a_large_block_fits_through(store: KVStoreServiceAsyncStub) -> None:
    """A block of nearly the whole store travels in one message."""
    assert await put(store, [block(0, size=CAPACITY - 1000)]) == 1
    assert len((await fetch(store, HASHES[:1]))[0][1]) == CAPACITY - 1000


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([block(0, namespace=b"")], "namespace"),
        ([block(0, namespace=bytes(257))], "namespace"),
        ([block(0), block(1, namespace=b"other")], "namespace"),
        ([block(0, hash=b"short")], "hash"),
        ([block(0, hash=bytes(33))], "hash"),
        ([block(0, parent=b"short")], "parent"),
        ([block(0, parent=HASHES[0])], "parent"),
        ([block(0, data=b"")], "data"),
        ([block(0, size=CAPACITY)], "data"),
    ],
)
async def test_a_wrong_block_is_refused(
    store: KVStoreServiceAsyncStub, requests: list[pb.PutRequest], field: str
) -> None:
    """Put names the field that is wrong: a namespace, a hash, a block larger than the store."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await put(store, requests)
    error = from_rpc_error(raised.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == field


@pytest.mark.parametrize(
    ("namespace", "hashes", "field"),
    [(b"", HASHES, "namespace"), (NAMESPACE, [], "hashes"), (NAMESPACE, [HASHES[0], b"x"], "hashes[1]")],
)
async def test_a_wrong_prefix_is_refused(
    store: KVStoreServiceAsyncStub, namespace: bytes, hashes: list[bytes], field: str
) -> None:
    """Lookup and Fetch name the field that is wrong."""
    for call in (
        store.Lookup(pb.LookupRequest(namespace=namespace, hashes=hashes)),
        store.Fetch(pb.FetchRequest(namespace=namespace, hashes=hashes)).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        error = from_rpc_error(raised.value)
        assert isinstance(error, InvalidRequest)
        assert error.field == field


async def test_it_tells_its_health(addresses: KVStoreAddresses) -> None:
    """A running store says SERVING, for itself and for its service."""
    async with rpc.channel(addresses.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "holdfast.v1.KVStoreService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_it_counts_what_it_does(store: KVStoreServiceAsyncStub, addresses: KVStoreAddresses) -> None:
    """/metrics tells hits, misses, bytes, evictions, and how full the store is."""
    half = CAPACITY // 2 - 1000
    await put(store, [block(0, size=half), block(1, size=half), block(2, size=half)])
    await put(store, [block(6, size=half, parent=b"")])
    await store.Lookup(pb.LookupRequest(namespace=NAMESPACE, hashes=HASHES[:3]))
    await fetch(store, HASHES[:1])
    page = await asyncio.to_thread(_read, f"http://127.0.0.1:{addresses.metrics_port}/metrics")
    told = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert {name: float(value) for name, value in told.items() if "created" not in name} == {
        'holdfast_kvstore_asked_blocks_total{call="lookup",outcome="hit"}': 1,
        'holdfast_kvstore_asked_blocks_total{call="lookup",outcome="miss"}': 2,
        'holdfast_kvstore_asked_blocks_total{call="fetch",outcome="hit"}': 1,
        'holdfast_kvstore_asked_blocks_total{call="fetch",outcome="miss"}': 0,
        'holdfast_kvstore_bytes_total{call="put"}': 4 * half,
        'holdfast_kvstore_bytes_total{call="fetch"}': half,
        'holdfast_kvstore_put_blocks_total{outcome="kept"}': 3,
        'holdfast_kvstore_put_blocks_total{outcome="refused"}': 1,
        "holdfast_kvstore_evicted_blocks_total": 1,
        "holdfast_kvstore_blocks": 2,
        "holdfast_kvstore_used_bytes": 2 * (half + 500),
        "holdfast_kvstore_capacity_bytes": CAPACITY,
    }


def _read(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        return str(response.read().decode())


async def test_an_address_that_is_taken_is_refused(addresses: KVStoreAddresses) -> None:
    """A second store on the same address does not start, and says why."""
    with pytest.raises(ConfigurationError, match=addresses.address):
        async with serve(KVStoreSettings(address=addresses.address)):
            pass
