"""OpenTelemetry: requests go in, one span for each that runs the model goes to a collector, by OTLP over HTTP.

Needs the packages of `autodeploy[tracing]`, and is imported only where traces are asked for.
"""

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autodeploy.server.logs import REQUEST_ID
from autodeploy.server.request_trace import CURRENT, RequestTrace

TRACED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})


def tracer_provider(endpoint: str) -> TracerProvider:
    """Makes spans and sends them to `endpoint` in batches; `shutdown` sends the rest.

    Whatever else there is to choose (service name, sampler, headers, batches) the SDK reads from OTEL_* variables.
    """
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):  # the SDK's own default
        resource = resource.merge(Resource({SERVICE_NAME: "autodeploy"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class TraceRequests:
    """ASGI middleware: a span from a request's arrival to the end of its answer.

    A `traceparent` header makes it a child of the caller's span. A status of 500 or more, an exception, or an answer
    that breaks off is an error; a refusal is not.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider):
        self._app = app
        self._tracer = provider.get_tracer("autodeploy")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in TRACED_PATHS:
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace, status = RequestTrace(), 0

        async def note_status(message: Message) -> None:
            nonlocal status
            status = message["status"] if message["type"] == "http.response.start" else status
            await send(message)

        name = f"POST {scope['path']}"
        token = CURRENT.set(trace)
        try:
            with self._tracer.start_as_current_span(
                name, context=propagate.extract(headers), kind=SpanKind.SERVER
            ) as span:
                try:
                    await self._app(scope, receive, note_status)
                finally:
                    _describe(span, trace, status, scope["path"])
        finally:
            CURRENT.reset(token)


def _describe(span: Span, trace: RequestTrace, status: int, path: str) -> None:
    span.set_attributes({"gen_ai.request.id": REQUEST_ID.get(), "http.request.method": "POST", "url.path": path})
    span.set_attributes(trace.attributes())
    if trace.operation:
        span.update_name(f"{trace.operation} {trace.model}")
    if status:
        span.set_attribute("http.response.status_code", status)
    if status >= 500 or trace.failure is not None:
        span.set_status(StatusCode.ERROR, trace.failure)
