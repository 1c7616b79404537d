"""What a KV store can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from holdfast.settings import Settings


class KVStoreSettings(Settings, env_prefix="HOLDFAST_KVSTORE_"):
    """One KV store."""

    address: str = "127.0.0.1:50054"
    """Where the service listens, `host:port`; port 0 for any."""
    metrics_address: str = ""
    """Where `/metrics` is served, `host:port`; empty for nowhere."""
    capacity_bytes: Annotated[int, Field(ge=1 << 20)] = 4 << 30
    """Memory for blocks."""
    drain_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long running calls may go on after the stop signal."""
