"""Logs, metrics and traces."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import httpx
import pytest
from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter

from holdfast import telemetry
from holdfast.errors import ConfigurationError


def test_a_trace_travels_in_the_headers_of_a_record() -> None:
    """What is injected here is the parent there."""
    context = trace.SpanContext(trace_id=0x1234, span_id=0x5678, is_remote=False, trace_flags=trace.TraceFlags(1))
    headers = telemetry.inject(trace.NonRecordingSpan(context))
    assert [name for name, _ in headers] == ["traceparent"]
    arrived = trace.get_current_span(telemetry.extract(headers)).get_span_context()
    assert (arrived.trace_id, arrived.span_id) == (0x1234, 0x5678)


def test_headers_that_are_no_trace_are_no_error() -> None:
    """Anybody may write to the log."""
    context = telemetry.extract((("traceparent", b"\xff\x00nonsense"),))
    assert not trace.get_current_span(context).get_span_context().is_valid


async def test_metrics_are_served_where_they_should_be() -> None:
    """And a bad address stops the start."""
    registry = CollectorRegistry()
    Counter("holdfast_bells", "Bells rung.", registry=registry).inc(3)
    async with telemetry.metrics_server("127.0.0.1:0", registry) as port:
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}/metrics")
        assert "holdfast_bells_total 3.0" in answer.text
        with pytest.raises(ConfigurationError, match=str(port)):
            async with telemetry.metrics_server(f"127.0.0.1:{port}", registry):
                pass


def test_a_library_that_repeats_itself_is_heard_once_in_a_while() -> None:
    """Other words are heard at once, and so is everybody else; the next line says how often it was said meanwhile."""
    now = 100.0
    repetitive = telemetry.Repetitive("lib", seconds=30, clock=lambda: now)

    def heard(name: str, words: str, *values: object) -> str | None:
        record = logging.LogRecord(name, logging.ERROR, "", 0, words, values, None)
        return f"{record.levelname} {record.getMessage()}" if repetitive.filter(record) else None

    assert heard("lib.client", "no %s", "broker 1") == "WARNING no broker 1"
    assert [heard("lib.client", "no %s", f"broker {n}") for n in range(9)] == [None] * 9
    assert heard("lib.client", "no topic") == "WARNING no topic"
    assert [heard("library", "no topic") for _ in range(2)] == ["ERROR no topic"] * 2
    now += 30
    assert heard("lib.client", "no %s", "broker 2") == "WARNING no broker 2 (and 9 times before, not shown)"
    now += 30
    assert heard("lib.client", "no %s", "broker 2") == "WARNING no broker 2"


def test_aiokafka_is_repetitive() -> None:
    """Of what it says a thousand times one line is left, and none where only errors are wanted."""
    program = (
        "import logging; from holdfast.telemetry import configure_logs; configure_logs('bell');"
        "[logging.getLogger('aiokafka.client').error('no %s', n) for n in range(1000)]"
    )
    for level, expected in (("info", [("no 0", "warning")]), ("error", [])):
        environment = {**os.environ, "HOLDFAST_LOG_LEVEL": level}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30, env=environment
        )
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert [(line["event"], line["level"]) for line in lines] == expected


def test_a_log_line_is_one_json_object_with_the_service() -> None:
    """Library logs included."""
    program = (
        "import logging, structlog; from holdfast.telemetry import configure_logs; configure_logs('bell');"
        "structlog.get_logger('a').info('rung', request_id='r1'); logging.getLogger('lib').warning('old %s', 'rope')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert (first["event"], first["request_id"], first["service"]) == ("rung", "r1", "bell")
    assert (second["event"], second["level"]) == ("old rope", "warning")
