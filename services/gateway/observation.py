"""One request as telemetry sees it: a server span with its phases, one record in each metric, one line in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from opentelemetry import trace
from opentelemetry.context import Context

from holdfast import semconv
from holdfast.errors import HoldfastError, InvalidRequest, RequestError
from holdfast.v1 import gateway_pb2
from services.gateway.admission import Admitted
from services.gateway.answer import Answer, State
from services.gateway.metrics import Metrics

log = structlog.get_logger(__name__)

SUBMITTED = "submitted"


class Observation:
    """What is known of one request, filled in as it goes on."""

    def __init__(self, face: str, operation: str, span: trace.Span, tracer: trace.Tracer, *, clients_id: str) -> None:
        self.face = face
        self.clients_id = clients_id
        self.operation = operation
        self.span = span
        self._tracer = tracer
        self._began = asyncio.get_running_loop().time()
        # Filled in by `generate`.
        self.model = ""
        self.admitted: Admitted | None = None
        self.answer: Answer | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[trace.Span]:
        """A span within the request's."""
        span = self._tracer.start_span(name, context=trace.set_span_in_context(self.span))
        try:
            yield span
        finally:
            span.end()

    def admit(self, admitted: Admitted, model: str) -> None:
        """The request may come in."""
        self.admitted, self.model = admitted, model
        sampling, rules = admitted.request.sampling, admitted.request.stop
        self.span.update_name(f"{self.operation} {model}")
        self.span.set_attributes(
            {
                semconv.REQUEST_MODEL: model,
                semconv.REQUEST_CHOICES: admitted.num_choices,
                semconv.REQUEST_SEED: str(admitted.seed),
                semconv.RESPONSE_ID: admitted.request_id,
            }
        )
        for name, message, attribute in (
            ("max_tokens", rules, semconv.REQUEST_MAX_TOKENS),
            ("temperature", sampling, semconv.REQUEST_TEMPERATURE),
            ("top_p", sampling, semconv.REQUEST_TOP_P),
            ("top_k", sampling, semconv.REQUEST_TOP_K),
        ):
            if message.HasField(name):  # type: ignore[arg-type]  # a field's name, as data
                self.span.set_attribute(attribute, getattr(message, name))

    def end(self, metrics: Metrics, outcome: str, error: HoldfastError | None) -> None:
        """The request ended; writes all that was seen."""
        duration = asyncio.get_running_loop().time() - self._began
        failure = type(error).__name__ if error is not None else ""
        metrics.ended(face=self.face, outcome=failure or outcome)
        metrics.took(
            duration,
            operation=self.operation,
            model=self.model,
            error=failure,
            first_token=self._first_token(),
            output_token=self._output_token(),
        )
        if self.answer is not None:
            self._count(metrics, self.answer)
        if error is not None:
            self.span.set_attribute(semconv.ERROR_TYPE, failure)
            self.span.set_status(trace.StatusCode.ERROR, _reason(error))
        with trace.use_span(self.span):  # the line gets its trace id
            log.info(
                "request ended",
                request_id=self.admitted.request_id if self.admitted is not None else "",
                clients_id=self.clients_id,
                face=self.face,
                outcome=failure or outcome,
                reason=_reason(error) if error is not None else "",
                seconds=round(duration, 4),
                output_tokens=sum(self.answer.num_shown) if self.answer is not None else 0,
            )

    def _count(self, metrics: Metrics, answer: Answer) -> None:
        cached = max((end.usage.cached_tokens for end in answer.ends), default=0)
        output = sum(answer.num_shown)
        metrics.prompt_tokens.inc(answer.prompt_tokens)
        metrics.cached_tokens.inc(cached)
        metrics.output_tokens.inc(output)
        self.span.set_attributes(
            {
                semconv.USAGE_INPUT_TOKENS: answer.prompt_tokens,
                semconv.USAGE_CACHED_TOKENS: cached,
                semconv.USAGE_OUTPUT_TOKENS: output,
                semconv.RESPONSE_FINISH_REASONS: [end.reason.value for end in answer.ends],
            }
        )

    def _first_token(self) -> float | None:
        if self.answer is None or self.answer.first_token_at is None:
            return None
        return self.answer.first_token_at - self._began

    def _output_token(self) -> float | None:
        """Seconds for each token after the first, in the longest choice."""
        if self.answer is None or self.answer.first_token_at is None or self.answer.last_token_at is None:
            return None
        num_more = max(self.answer.num_shown) - 1
        return (self.answer.last_token_at - self.answer.first_token_at) / num_more if num_more > 0 else None


def _reason(error: HoldfastError) -> str:
    """What logs and traces may hold of an error: the text of a refusal repeats what the client sent."""
    if isinstance(error, InvalidRequest):
        return error.field
    return "" if isinstance(error, RequestError) else str(error)


@dataclass(slots=True)
class Resumed:
    """What is known of a stream that goes on."""

    answer: Answer | None = None
    """Filled in once it does."""


class Observer:
    """Observes every request of a gateway."""

    def __init__(self, metrics: Metrics, tracer: trace.Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer

    @contextmanager
    def resumption(self, *, face: str, parent: Context) -> Iterator[Resumed]:
        """A stream that goes on, from its call to its end. The request's own metrics were, or will be, those of the
        gateway that accepted it."""
        span = self._tracer.start_span("resume", context=parent, kind=trace.SpanKind.SERVER)
        seen, outcome, reason = Resumed(), "left", ""
        try:
            yield seen
            if seen.answer is not None and seen.answer.state is State.FINISHED:
                outcome = State.FINISHED.value
        except HoldfastError as error:
            outcome, reason = type(error).__name__, _reason(error)
            span.set_attribute(semconv.ERROR_TYPE, outcome)
            span.set_status(trace.StatusCode.ERROR, reason)
            raise
        finally:
            self._metrics.resumed.labels(face, outcome).inc()
            request_id = seen.answer.request_id if seen.answer is not None else ""
            span.set_attribute(semconv.RESPONSE_ID, request_id)
            with trace.use_span(span):
                log.info("resumed stream ended", request_id=request_id, face=face, outcome=outcome, reason=reason)
            span.end()

    @contextmanager
    def request(
        self, request: gateway_pb2.GenerateRequest, *, face: str, parent: Context, clients_id: str = ""
    ) -> Iterator[Observation]:
        """A request, from its call to its end, however that comes. `clients_id`: what the client calls it."""
        operation = semconv.OPERATION_CHAT if request.HasField("chat") else semconv.OPERATION_COMPLETION
        span = self._tracer.start_span(
            operation,
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={semconv.OPERATION: operation, semconv.PROVIDER: semconv.PROVIDER_HOLDFAST},
        )
        if clients_id:
            span.set_attribute(semconv.CLIENTS_ID, (clients_id,))
        seen = Observation(face, operation, span, self._tracer, clients_id=clients_id)
        outcome, error = "left", None
        try:
            yield seen
            outcome = SUBMITTED if seen.answer is None else seen.answer.state.value
        except HoldfastError as caught:
            error = caught
            raise
        finally:
            if seen.answer is not None and seen.answer.state is State.BROKEN:
                error = seen.answer.error
            seen.end(self._metrics, "left" if outcome == State.CLOSED.value else outcome, error)
            span.end()
