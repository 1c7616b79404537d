"""What a service tells about itself: structured logs, Prometheus metrics, OpenTelemetry traces.

* Logs: one line for each event, with the request id and the trace id where there is one; JSON, or readable where the
  output is a terminal. Never prompt text.
* Metrics: a registry for each process (nothing global), read over HTTP at `/metrics`.
* Traces: a span for each request and each phase of it, never one for each token. Off, at no cost, unless
  `OTEL_EXPORTER_OTLP_ENDPOINT` says where to send them. `traceparent` travels in the headers of records.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import structlog
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from prometheus_client import CollectorRegistry, start_http_server

from holdfast.bus import Headers
from holdfast.errors import CannotListen, ConfigurationError

LEVEL_VARIABLE = "HOLDFAST_LOG_LEVEL"
FORMAT_VARIABLE = "HOLDFAST_LOG_FORMAT"

QUIET_SECONDS = 30.0
"""For how long a library does not say again what it has just said."""


def configure_logs(service: str, *, level: str = "info") -> None:
    """Sends all logs of this process, those of libraries too, to standard error. `HOLDFAST_LOG_LEVEL` (by default
    `level`) and `HOLDFAST_LOG_FORMAT` (json, or text; text on a terminal) decide how.

    Raises:
        ConfigurationError: one of the two has a value that means nothing.
    """
    level = os.environ.get(LEVEL_VARIABLE, level).upper()
    form = os.environ.get(FORMAT_VARIABLE, "text" if sys.stderr.isatty() else "json")
    if level not in logging.getLevelNamesMapping():
        raise ConfigurationError(f"{LEVEL_VARIABLE} must be debug, info, warning or error, not {level.lower()!r}")
    if form not in ("json", "text"):
        raise ConfigurationError(f"{FORMAT_VARIABLE} must be json or text, not {form!r}")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        _add_trace,
    ]
    render: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    last = [structlog.processors.format_exc_info] if form == "json" else []
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # aiokafka says at INFO and WARNING what is its ordinary life: joins, retries, closed sockets; and it calls an error,
    # ten times a second, what it tries again. What it gives up it raises.
    logging.getLogger("aiokafka").setLevel(logging.ERROR if root.level <= logging.WARNING else logging.CRITICAL)
    handler.addFilter(Repetitive("aiokafka", seconds=QUIET_SECONDS))
    structlog.contextvars.bind_contextvars(service=service)


class Repetitive(logging.Filter):
    """Lets what a library repeats pass once in some seconds, with the number of those held back, as warnings. The same
    is what has the same words, whatever its values; there are as many as the library has lines that log."""

    def __init__(self, library: str, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._library = library
        self._seconds = seconds
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}
        self._held_back: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != self._library:
            return True
        words, now = (record.name, str(record.msg)), self._clock()
        if now - self._last.get(words, -self._seconds) < self._seconds:
            self._held_back[words] = self._held_back.get(words, 0) + 1
            return False
        self._last[words] = now
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        if num_held_back := self._held_back.pop(words, 0):
            record.msg, record.args = f"{record.getMessage()} (and {num_held_back} times before, not shown)", ()
        return True


def _add_trace(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = format(context.trace_id, "032x")
    return event


@contextmanager
def tracing(service: str) -> Iterator[trace.Tracer]:
    """The service's tracer. Spans go by OTLP to `OTEL_EXPORTER_OTLP_ENDPOINT`; unset, none is recorded. What is
    buffered is sent before the block is left."""
    if "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ:
        yield trace.NoOpTracer()
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"holdfast-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield provider.get_tracer("holdfast")
    finally:
        provider.shutdown()


def inject(span: trace.Span) -> Headers:
    """Record headers that carry a span's context."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    return tuple((name, value.encode()) for name, value in carrier.items())


def extract(headers: Headers) -> Context:
    """The trace context that record headers carry; an empty one where they carry none."""
    return propagate.extract({name: value.decode("ascii", "replace") for name, value in headers})


@asynccontextmanager
async def metrics_server(address: str, registry: CollectorRegistry) -> AsyncIterator[int]:
    """Serves `/metrics` on `host:port` (port 0: any) and yields the port; an empty address serves nothing, port 0.

    Raises:
        CannotListen: the address cannot be bound.
    """
    if not address:
        yield 0
        return
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), addr=host, registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        raise CannotListen(address, error) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
