"""What a gateway counts and measures; one record for each request, nothing for each token."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from holdfast.semconv import (
    DURATION_BUCKETS,
    ERROR_TYPE,
    FIRST_TOKEN_BUCKETS,
    OPERATION,
    OUTPUT_TOKEN_BUCKETS,
    PROVIDER,
    PROVIDER_HOLDFAST,
    REQUEST_DURATION,
    REQUEST_MODEL,
    TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
    prometheus,
)

LABELS = [prometheus(name) for name in (OPERATION, PROVIDER, REQUEST_MODEL)]


class Metrics:
    """The metrics of one gateway, in this registry, or one of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._duration = Histogram(
            prometheus(REQUEST_DURATION, "seconds"),
            "From the call to the last token, or to the refusal.",
            [*LABELS, prometheus(ERROR_TYPE)],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._first_token = Histogram(
            prometheus(TIME_TO_FIRST_TOKEN, "seconds"),
            "From the call to the first token.",
            LABELS,
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._output_token = Histogram(
            prometheus(TIME_PER_OUTPUT_TOKEN, "seconds"),
            "From the first token to the last, divided by the tokens between them in the longest choice.",
            LABELS,
            buckets=OUTPUT_TOKEN_BUCKETS,
            registry=registry,
        )
        self._requests = Counter(
            "holdfast_gateway_requests",
            "Requests that ended, by the face they came through and how they ended: finished, submitted, left (by the "
            "client), or the error.",
            ["face", "outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "holdfast_gateway_tokens",
            "Tokens of requests that ended: prompt, cached, output.",
            ["type"],
            registry=registry,
        )
        self.prompt_tokens = self._tokens.labels("prompt")
        self.cached_tokens = self._tokens.labels("cached")
        self.output_tokens = self._tokens.labels("output")
        self.stale_records = Counter(
            "holdfast_gateway_stale_records",
            "Records of the token topic that were ignored: written under an epoch that is over.",
            registry=registry,
        )
        self.unreadable_records = Counter(
            "holdfast_gateway_unreadable_records",
            "Records of the token topic that are no TokenBatch.",
            registry=registry,
        )
        self.resumed = Counter(
            "holdfast_gateway_resumed_streams",
            "Streams that went on from a cursor, by the face and how they ended: finished, left (by the client), or the error.",
            ["face", "outcome"],
            registry=registry,
        )
        self._open = Gauge(
            "holdfast_gateway_open_requests", "Requests between the call and their last token.", registry=registry
        )

        self._refused = Counter(
            "holdfast_gateway_refused_requests",
            "Requests that were refused because too much runs or waits, by the reason: streams (as many are open here as "
            "this gateway takes), wait (a new one would wait too long for an engine), waiting (too many wait).",
            ["reason"],
            registry=registry,
        )
        for reason in ("streams", "wait", "waiting"):
            self._refused.labels(reason)
        self._waiting = Gauge(
            "holdfast_gateway_waiting_requests",
            "Requests that wait for an engine, in the whole mesh, by class: what the log told, and what came here since.",
            ["request_class"],
            registry=registry,
        )
        self._wait = Gauge(
            "holdfast_gateway_estimated_wait_seconds",
            "How long a new request would wait for an engine, by class; NaN where nobody knows.",
            ["request_class"],
            registry=registry,
        )

    def watch_open(self, count: Callable[[], int]) -> None:
        """Has the number of open requests asked for at each scrape."""
        self._open.set_function(count)

    def watch_backlog(self, name: str, *, waiting: Callable[[], int], wait: Callable[[], float | None]) -> None:
        """Has the backlog of a class asked for at each scrape."""
        self._waiting.labels(name).set_function(waiting)
        self._wait.labels(name).set_function(lambda: math.nan if (seconds := wait()) is None else seconds)

    def refused(self, reason: str) -> None:
        """A request was refused because too much runs or waits."""
        self._refused.labels(reason).inc()

    def ended(self, *, face: str, outcome: str) -> None:
        """A request ended."""
        self._requests.labels(face, outcome).inc()

    def took(
        self,
        duration: float,
        *,
        operation: str,
        model: str,
        error: str = "",
        first_token: float | None = None,
        output_token: float | None = None,
    ) -> None:
        """How long a request took, in seconds: in all, to its first token, and for each token after it."""
        labels = (operation, PROVIDER_HOLDFAST, model)
        self._duration.labels(*labels, error).observe(duration)
        if first_token is not None:
            self._first_token.labels(*labels).observe(first_token)
        if output_token is not None:
            self._output_token.labels(*labels).observe(output_token)
