"""What a KV store tells about itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.kvstore.store import BlockStore


class KVStoreMetrics:
    """The counters of one store."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        asked = Counter(
            "holdfast_kvstore_asked_blocks",
            "Blocks that calls asked for, by call and by whether they were held",
            ["call", "outcome"],
            registry=registry,
        )
        moved = Counter("holdfast_kvstore_bytes", "Bytes of blocks put and fetched", ["call"], registry=registry)
        put = Counter(
            "holdfast_kvstore_put_blocks",
            "Blocks put: kept (or held already), or refused because their parent is not held",
            ["outcome"],
            registry=registry,
        )
        self.evicted = Counter("holdfast_kvstore_evicted_blocks", "Blocks dropped to make room", registry=registry)
        self.lookup_hits, self.lookup_misses = asked.labels("lookup", "hit"), asked.labels("lookup", "miss")
        self.fetch_hits, self.fetch_misses = asked.labels("fetch", "hit"), asked.labels("fetch", "miss")
        self.put_bytes, self.fetched_bytes = moved.labels("put"), moved.labels("fetch")
        self.kept, self.refused = put.labels("kept"), put.labels("refused")

    def watch(self, store: BlockStore) -> None:
        """Reports how full this store is."""
        gauges = (
            ("blocks", "Blocks held", lambda: store.num_blocks),
            ("used_bytes", "Memory that they take", lambda: store.num_bytes),
            ("capacity_bytes", "Memory that they may take", lambda: store.capacity_bytes),
        )
        for name, what, read in gauges:
            Gauge(f"holdfast_kvstore_{name}", what, registry=self._registry).set_function(read)
