"""One request as traces tell it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from holdfast import semconv
from holdfast.errors import InvalidRequest
from holdfast.events import FinishReason, Model
from holdfast.telemetry import extract
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1.generation_pb2 import SamplingParams, StopRules
from services.gateway.admission import Admission
from services.gateway.metrics import Metrics
from services.gateway.observation import Observer
from services.gateway.settings import GatewaySettings
from tests.gateway.doubles import CONTEXT, MODEL, VOCABULARY
from tests.gateway.test_answer import Feed


class Spans:
    """Where spans end up."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.observer = Observer(Metrics(), self._provider.get_tracer("test"))

    def named(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return span


@pytest.fixture
def spans() -> Spans:
    return Spans()


async def test_a_request_is_a_server_span_with_its_phases(spans: Spans) -> None:
    """The span continues the client's trace, says what was asked and what it cost, and has a child for each phase."""
    parent = extract((("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),))
    model = Model(MODEL, context_length=CONTEXT, vocab_size=VOCABULARY, chat=True, created=datetime.now(UTC))
    request = pb.GenerateRequest(
        prompt="hi",
        request_id="r-1",
        sampling=SamplingParams(temperature=0.5, top_k=3, seed=7),
        stop=StopRules(max_tokens=9),
    )
    feed = Feed()
    with spans.observer.request(request, face="grpc", parent=parent) as seen:
        seen.admit(Admission(GatewaySettings()).admit(request, model), MODEL)
        with seen.phase("tokenize"):
            pass
        seen.answer = feed.answer
        feed.say("abc", finish=FinishReason.LENGTH)
    span = spans.named(f"text_completion {MODEL}")
    assert span.kind is SpanKind.SERVER
    assert span.attributes is not None
    assert {
        semconv.OPERATION: "text_completion",
        semconv.PROVIDER: "holdfast",
        semconv.REQUEST_MODEL: MODEL,
        semconv.REQUEST_TEMPERATURE: 0.5,
        semconv.REQUEST_TOP_K: 3,
        semconv.REQUEST_SEED: "7",
        semconv.REQUEST_MAX_TOKENS: 9,
        semconv.RESPONSE_ID: "r-1",
        semconv.RESPONSE_FINISH_REASONS: ("length",),
        semconv.USAGE_INPUT_TOKENS: 2,
        semconv.USAGE_OUTPUT_TOKENS: 3,
    }.items() <= span.attributes.items()
    assert semconv.REQUEST_TOP_P not in span.attributes
    assert span.context is not None
    assert span.parent is not None
    assert format(span.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    phase = spans.named("tokenize")
    assert phase.parent is not None
    assert phase.parent.span_id == span.context.span_id


async def test_what_the_client_calls_it_stands_in_trace_and_log(
    spans: Spans, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the mesh's id, so that both can be found."""
    request = pb.GenerateRequest(prompt="hi")
    with spans.observer.request(request, face="http", parent=Context(), clients_id="theirs"):
        pass
    span = spans.named("text_completion")
    assert span.attributes is not None
    assert span.attributes[semconv.CLIENTS_ID] == ("theirs",)
    assert "theirs" in capsys.readouterr().out


async def test_a_refusal_is_an_error_of_its_kind(spans: Spans) -> None:
    """A request that is refused has the error's name in its span, and the field, but not what the client wrote in it."""
    request = pb.GenerateRequest()
    request.chat.SetInParent()
    with (
        pytest.raises(InvalidRequest),
        spans.observer.request(request, face="http", parent=Context()),
    ):
        raise InvalidRequest("not a secret", field="chat.messages")
    span = spans.named("chat")
    assert span.attributes is not None
    assert span.attributes[semconv.ERROR_TYPE] == "InvalidRequest"
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "chat.messages")


async def test_a_client_that_leaves_is_no_error(spans: Spans) -> None:
    """A cancelled call ends its span without an error."""
    with (
        pytest.raises(asyncio.CancelledError),
        spans.observer.request(pb.GenerateRequest(prompt="hi"), face="grpc", parent=Context()),
    ):
        raise asyncio.CancelledError
    span = spans.named("text_completion")
    assert span.status.status_code is StatusCode.UNSET
