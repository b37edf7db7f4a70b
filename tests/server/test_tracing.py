"""Traces: one span per request that runs the model, under the conventions' names, a child of the caller's span."""

import http.server
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from autodeploy.errors import ConfigError
from autodeploy.server import tracing
from autodeploy.server.options import ServerOptions, parse_server_options
from tests.runtime.fake_engine import FakeEngine
from tests.server.running import ANSWER_IDS, EOS, MESSAGES, Serve, Start, random_engine, wait_until

ENDPOINT = "http://127.0.0.1:9/v1/traces"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where spans go instead of to a collector, as soon as they end."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda endpoint: exporter)
    monkeypatch.setattr(tracing, "BatchSpanProcessor", SimpleSpanProcessor)
    return exporter


def ended(exporter: InMemorySpanExporter, count: int = 1) -> tuple[ReadableSpan, ...]:
    wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    spans = exporter.get_finished_spans()
    assert len(spans) == count
    return spans


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_completion_is_one_span_under_the_callers(start: Start, exporter: InMemorySpanExporter) -> None:
    server = start(random_engine(), otlp_traces_endpoint=ENDPOINT)
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "ignore_eos": True}
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "X-Request-Id": "abc-1"}
    answer = server.post("/v1/completions", body, headers=headers).json()
    (span,) = ended(exporter)
    assert span.name == "text_completion tiny" and span.kind is SpanKind.SERVER
    assert f"{span.get_span_context().trace_id:032x}" == TRACE_ID
    assert span.parent is not None and f"{span.parent.span_id:016x}" == SPAN_ID and span.parent.is_remote
    found = attributes(span)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.id": "abc-1",
        "gen_ai.response.id": answer["id"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.response.finish_reasons": ("length",) * 4,
        "http.response.status_code": 200,
    }
    assert expected.items() <= found.items()
    queued, first, end = (found[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e"))
    assert span.end_time is not None and span.start_time is not None
    assert 0 <= queued <= first <= end <= (span.end_time - span.start_time) / 1e9
    assert span.status.status_code is StatusCode.UNSET


def test_a_stream_is_one_span_to_its_end(start: Start, exporter: InMemorySpanExporter) -> None:
    server = start(otlp_traces_endpoint=ENDPOINT)
    response = server.post("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "temperature": 0})
    assert response.text.endswith("data: [DONE]\n\n")
    (span,) = ended(exporter)
    found = attributes(span)
    assert span.name == "chat tiny" and span.parent is None
    assert found["gen_ai.request.stream"] is True and found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.usage.output_tokens"] == len(ANSWER_IDS) + 1
    assert "gen_ai.request.max_tokens" not in found, "none was asked for"


def test_what_is_refused_is_a_span_without_an_error(start: Start, exporter: InMemorySpanExporter) -> None:
    server = start(otlp_traces_endpoint=ENDPOINT, api_key=("k",))
    key = {"Authorization": "Bearer k"}
    server.post("/v1/completions", {"prompt": "x"})  # a stranger's requests are no business of the collector
    httpx.get(f"{server.url}/v1/models", headers=key)
    server.post("/v1/completions", {"prompt": "x", "temperature": -1}, headers=key)
    (span,) = ended(exporter)
    assert span.name == "POST /v1/completions" and span.status.status_code is StatusCode.UNSET
    assert attributes(span)["http.response.status_code"] == 400


def test_an_answer_that_breaks_off_is_an_error(start: Start, exporter: InMemorySpanExporter) -> None:
    server = start(FakeEngine(crash_at_step=4), otlp_traces_endpoint=ENDPOINT)
    body = {"prompt": "x", "max_tokens": 10, "ignore_eos": True}
    assert '"error"' in server.post("/v1/completions", {**body, "stream": True}).text
    assert server.post("/v1/completions", body).status_code == 503
    broken, refused = ended(exporter, 2)
    assert broken.status.status_code is StatusCode.ERROR and "stopped" in str(broken.status.description)
    assert attributes(broken)["gen_ai.usage.output_tokens"] == 3
    assert attributes(broken)["gen_ai.response.finish_reasons"] == ("abort",)
    assert refused.status.status_code is StatusCode.ERROR
    assert attributes(refused)["http.response.status_code"] == 503


@pytest.fixture
def collector() -> Iterator[tuple[str, "queue.Queue[tuple[Any, bytes]]"]]:
    """A collector on this machine: its URL, and the headers and bodies that it is sent."""
    received: queue.Queue[tuple[Any, bytes]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()
        thread.join(10)


def test_spans_reach_a_collector_before_the_server_ends(
    serve: Serve, collector: tuple[str, "queue.Queue[tuple[Any, bytes]]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    url, server, _ = serve(FakeEngine(ANSWER_IDS, eos_id=EOS), otlp_traces_endpoint=endpoint)
    httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
    server.should_exit = True
    headers, body = received.get(timeout=20)
    sent = ExportTraceServiceRequest.FromString(body)
    (span,) = sent.resource_spans[0].scope_spans[0].spans
    resource = {entry.key: entry.value.string_value for entry in sent.resource_spans[0].resource.attributes}
    assert span.name == "text_completion tiny" and headers["x-tenant"] == "blue"
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("autodeploy", "test")


def test_the_service_may_have_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-backend")
    provider = tracing.tracer_provider(ENDPOINT)
    assert provider.resource.attributes["service.name"] == "chat-backend"
    provider.shutdown()


def test_what_cannot_be_traced_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("localhost:4317", "", 4318):
        with pytest.raises(ConfigError, match="must be a URL"):
            parse_server_options({"otlp_traces_endpoint": bad})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match=r"'grpc'.*http/protobuf alone"):
        parse_server_options({"otlp_traces_endpoint": ENDPOINT})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")  # the narrower one decides
    assert parse_server_options({"otlp_traces_endpoint": ENDPOINT}).otlp_traces_endpoint == ENDPOINT
    monkeypatch.delitem(sys.modules, "autodeploy.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'autodeploy\[tracing\]'"):
        parse_server_options({"otlp_traces_endpoint": ENDPOINT})
    assert ServerOptions().otlp_traces_endpoint is None
