"""The spans of a choice, made at its end from the times the scheduler noted: queue, prefill, decode."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context

from holdfast import ids, semconv, telemetry
from services.engine.requests import Request
from services.engine.sequence import Sequence


def trace_sequence(tracer: trace.Tracer, request: Request, sequence: Sequence) -> None:
    """Records what became of a sequence that ended, beneath the span that the request's record names."""
    parent = telemetry.extract(request.headers)
    ended = sequence.ended_at
    marks = (
        ("queue", sequence.arrival, sequence.started_at or ended),
        ("prefill", sequence.started_at, sequence.first_token_at or ended),
        ("decode", sequence.first_token_at, ended),
    )
    for name, begin, end in marks:
        if begin is not None and end is not None:
            _span(tracer, name, parent, begin, max(begin, end), sequence)


def _span(tracer: trace.Tracer, name: str, parent: Context, begin: float, end: float, sequence: Sequence) -> None:
    span = tracer.start_span(
        name,
        context=parent,
        start_time=_nanoseconds(begin),
        attributes={
            semconv.RESPONSE_ID: ids.of_client(sequence.request_id),
            "holdfast.choice": sequence.choice,
            semconv.USAGE_INPUT_TOKENS: len(sequence.prompt_ids),
            semconv.USAGE_CACHED_TOKENS: sequence.num_cached,
            semconv.USAGE_OUTPUT_TOKENS: len(sequence.output_ids),
        },
    )
    span.end(_nanoseconds(end))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
