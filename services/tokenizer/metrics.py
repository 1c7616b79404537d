"""What a tokenizer counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5)


class TokenizerMetrics:
    """The tokenizer's metrics, in the registry of its service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        tokens = Counter(
            "holdfast_tokenizer_tokens", "Tokens made of text, and text made of tokens.", ["way"], registry=registry
        )
        self.encoded = tokens.labels("encoded")
        self.decoded = tokens.labels("decoded")
        self.encode_seconds = Histogram(
            "holdfast_tokenizer_encode_seconds",
            "From the arrival of text or a conversation to its ids.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.waiting = Gauge("holdfast_tokenizer_waiting", "Calls that encode, or wait for it.", registry=registry)
