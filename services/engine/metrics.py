"""What an engine counts and measures, in the registry of its service. Names as vLLM's, with our prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.engine.batch import Step
from services.engine.sequence import Sequence

_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class EngineMetrics:
    """The metrics of one engine. The step thread and the event loop both count here."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"holdfast_{name}", what, registry=registry)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"holdfast_{name}", what, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"holdfast_{name}", what, buckets=buckets, registry=registry)

        self._running = gauge("num_requests_running", "Sequences that hold a slot.")
        self._waiting = gauge("num_requests_waiting", "Sequences taken from the log that hold none yet.")
        self._cache_usage = gauge(
            "kv_cache_usage_perc", "Blocks in use by running sequences, as a part of all, 0 to 1."
        )
        self._queried = counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache or fetched from the store.")
        self._preemptions = counter("num_preemptions", "Sequences thrown out of their slot for want of blocks.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens computed of prompts, and again after a preemption.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._step_seconds = histogram("step_seconds", "From the launch of a step to its result.", _STEP_BUCKETS)
        self._step_tokens = histogram("iteration_tokens_total", "Tokens computed in a step.", _TOKEN_BUCKETS)
        self._queue_seconds = histogram(
            "request_queue_time_seconds", "From acceptance to the first slot.", _WAIT_BUCKETS
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From acceptance to the first token.", _WAIT_BUCKETS
        )
        self._token_seconds = histogram(
            "time_per_output_token_seconds", "Mean time between the tokens of a choice.", _STEP_BUCKETS
        )
        self._ended = Counter(
            "holdfast_request_success", "Choices that ended, by reason.", ["finished_reason"], registry=registry
        )
        self.unreadable_records = counter("unreadable_records", "Records of the request topics that are no request.")
        self.resent_records = counter("resent_records", "Token records that were sent again for want of an ack.")
        self.dead_letters = counter("dead_letters", "Requests given up because engine after engine began them in vain.")
        self._resumed = counter("resumed_requests", "Choices that go on where another engine left them.")
        self._resumed_tokens = counter("resumed_tokens", "Tokens that other engines had generated of those.")
        self.blocks_fetched = counter("store_blocks_fetched", "Blocks fetched from the KV store.")
        self.blocks_saved = counter("store_blocks_saved", "Blocks sent to the KV store.")
        self.store_failures = counter("store_failures", "Calls to the KV store that failed or came too late.")
        self._totals = (0, 0, 0, 0, 0)

    def watch(self, *, running: Callable[[], int], waiting: Callable[[], int], usage: Callable[[], float]) -> None:
        """Has these asked for at each scrape."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._cache_usage.set_function(usage)

    def step(self, step: Step, seconds: float) -> None:
        """A step took so long."""
        self._step_seconds.observe(seconds)
        self._step_tokens.observe(step.num_tokens)

    def count(self, *, queried: int, hits: int, preemptions: int, prefill: int, generated: int) -> None:
        """Totals since the start, as the scheduler keeps them."""
        totals = (queried, hits, preemptions, prefill, generated)
        counters = (self._queried, self._hits, self._preemptions, self._prompt_tokens, self._generated)
        for each, total, before in zip(counters, totals, self._totals, strict=True):
            each.inc(total - before)
        self._totals = totals

    def refused(self, reason: str) -> None:
        """A choice ended before it was ever scheduled."""
        self._ended.labels(reason).inc()

    def resumed(self, sequences: Iterable[Sequence]) -> None:
        """Sequences are about to begin, some of them with tokens of another engine."""
        for each in sequences:
            if each.output_ids:
                self._resumed.inc()
                self._resumed_tokens.inc(len(each.output_ids))

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended."""
        assert sequence.finish is not None
        self._ended.labels(sequence.finish.value).inc()
        if sequence.started_at is not None:
            self._queue_seconds.observe(max(0.0, sequence.started_at - sequence.arrival))
        if sequence.first_token_at is None or sequence.ended_at is None:
            return
        self._first_token.observe(max(0.0, sequence.first_token_at - sequence.arrival))
        if len(sequence.output_ids) > 1:
            seconds = sequence.ended_at - sequence.first_token_at
            self._token_seconds.observe(seconds / (len(sequence.output_ids) - 1))
