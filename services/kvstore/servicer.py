"""The service's edge: messages checked, blocks in and out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from holdfast import rpc
from holdfast.errors import InvalidRequest
from holdfast.v1 import kvstore_pb2, kvstore_pb2_grpc
from services.kvstore.metrics import KVStoreMetrics
from services.kvstore.store import BlockStore

SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"].full_name

HASH_BYTES = range(16, 33)
"""How long a chained hash may be: what two prefixes never share, and no more."""

MAX_NAMESPACE_BYTES = 256
MAX_HASHES = 1 << 16
"""Most blocks of one prefix: two million tokens in blocks of 32."""


class KVStoreServicer(kvstore_pb2_grpc.KVStoreServiceServicer):
    """KVStoreService, as protos/holdfast/v1/kvstore.proto promises it. Each call does a little work for each block and
    copies nothing, so it stays on the event loop."""

    def __init__(self, store: BlockStore, metrics: KVStoreMetrics) -> None:
        self._store = store
        self._metrics = metrics

    @rpc.unary
    async def Lookup(self, request: kvstore_pb2.LookupRequest, context: Any) -> kvstore_pb2.LookupResponse:
        _check_prefix(request.namespace, request.hashes)
        number = self._store.count(request.namespace, request.hashes)
        self._metrics.lookup_hits.inc(number)
        self._metrics.lookup_misses.inc(len(request.hashes) - number)
        return kvstore_pb2.LookupResponse(num_blocks=number)

    @rpc.stream
    async def Fetch(self, request: kvstore_pb2.FetchRequest, context: Any) -> AsyncIterator[kvstore_pb2.FetchResponse]:
        _check_prefix(request.namespace, request.hashes)
        number = self._store.count(request.namespace, request.hashes)
        self._metrics.fetch_hits.inc(number)
        self._metrics.fetch_misses.inc(len(request.hashes) - number)
        for block_hash in request.hashes[:number]:
            data = self._store.get(request.namespace, block_hash)
            if data is None:  # dropped while the ones before it were sent
                break
            yield kvstore_pb2.FetchResponse(hash=block_hash, data=data)
            self._metrics.fetched_bytes.inc(len(data))

    @rpc.unary
    async def Put(self, requests: AsyncIterator[kvstore_pb2.PutRequest], context: Any) -> kvstore_pb2.PutResponse:
        num_kept = 0
        namespace: bytes | None = None
        previous = b""
        async for request in requests:
            if namespace is None:
                _check_namespace(request.namespace)
                namespace = request.namespace
            self._check_block(request, namespace)
            if request.parent and request.parent != previous:
                # A prefix that is put to is in use: its blocks must not be the ones that go to make room.
                self._store.count(namespace, [request.parent])
            previous = request.hash
            kept = self._store.put(namespace, request.hash, request.data, parent=request.parent)
            num_kept += kept
            (self._metrics.kept if kept else self._metrics.refused).inc()
            self._metrics.put_bytes.inc(len(request.data))
        return kvstore_pb2.PutResponse(num_kept=num_kept)

    def _check_block(self, request: kvstore_pb2.PutRequest, namespace: bytes) -> None:
        if request.namespace != namespace:
            raise InvalidRequest("all blocks of a call belong to one namespace", field="namespace")
        _check_hash(request.hash, field="hash")
        if request.parent:
            _check_hash(request.parent, field="parent")
        if request.parent == request.hash:
            raise InvalidRequest("a block cannot follow itself", field="parent")
        size, limit = len(request.data), self._store.max_data_bytes
        if not 0 < size <= limit:
            raise InvalidRequest(f"{size:,} bytes of data; a block has 1 to {limit:,} in this store", field="data")


def _check_prefix(namespace: bytes, hashes: Sequence[bytes]) -> None:
    _check_namespace(namespace)
    if not 0 < len(hashes) <= MAX_HASHES:
        raise InvalidRequest(f"{len(hashes):,} hashes; a call has 1 to {MAX_HASHES:,}", field="hashes")
    for index, block_hash in enumerate(hashes):
        _check_hash(block_hash, field=f"hashes[{index}]")


def _check_namespace(namespace: bytes) -> None:
    if not 0 < len(namespace) <= MAX_NAMESPACE_BYTES:
        raise InvalidRequest(
            f"{len(namespace)} bytes of namespace; there are 1 to {MAX_NAMESPACE_BYTES}", field="namespace"
        )


def _check_hash(block_hash: bytes, *, field: str) -> None:
    if len(block_hash) not in HASH_BYTES:
        raise InvalidRequest(
            f"a hash of {len(block_hash)} bytes; it has {HASH_BYTES[0]} to {HASH_BYTES[-1]}", field=field
        )


def servicer(implementation: KVStoreServicer) -> rpc.Servicer:
    """The service, as a server takes it."""
    add = kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server
    return rpc.Servicer(name=SERVICE, add=lambda server: add(implementation, server))
