"""One KV store: `python -m services.kvstore`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from holdfast import rpc
from holdfast.service import run
from holdfast.telemetry import metrics_server
from services.kvstore.metrics import KVStoreMetrics
from services.kvstore.servicer import KVStoreServicer, servicer
from services.kvstore.settings import KVStoreSettings
from services.kvstore.store import BlockStore


@dataclass(frozen=True, slots=True)
class KVStoreAddresses:
    """Where a running KV store listens."""

    address: str
    """`host:port` of the service."""
    metrics_port: int
    """Port of `/metrics`; 0 where it is not served."""


@asynccontextmanager
async def serve(
    settings: KVStoreSettings, *, registry: CollectorRegistry | None = None
) -> AsyncIterator[KVStoreAddresses]:
    """A KV store that is ready, and empty. Leaving the block lets running calls end, and forgets all blocks.

    Raises:
        ConfigurationError: an address cannot be bound.
    """
    registry = registry or CollectorRegistry()
    metrics = KVStoreMetrics(registry)
    store = BlockStore(settings.capacity_bytes, on_evict=metrics.evicted.inc)
    metrics.watch(store)
    async with (
        metrics_server(settings.metrics_address, registry) as metrics_port,
        rpc.serving(
            settings.address, [servicer(KVStoreServicer(store, metrics))], drain=settings.drain_seconds
        ) as server,
    ):
        await server.health.ready()
        yield KVStoreAddresses(address=server.address, metrics_port=metrics_port)


def main() -> None:
    """`python -m services.kvstore`."""
    run("kvstore", KVStoreSettings, serve)


if __name__ == "__main__":
    main()
