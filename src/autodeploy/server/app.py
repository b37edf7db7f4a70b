"""The FastAPI app: an engine, a tokenizer and a model's name go in, OpenAI's routes come out."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from autodeploy.server import status
from autodeploy.server.access import AllowOrigins, RequireKey
from autodeploy.server.answers import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
)
from autodeploy.server.failures import ERROR_RESPONSES, ERROR_RESPONSES_IN_JSON, add_error_handlers, error_response
from autodeploy.server.limits import LimitBody
from autodeploy.server.logs import RequestLog
from autodeploy.server.metrics import ServingMetrics
from autodeploy.server.options import ServerOptions
from autodeploy.server.prompts import PromptReader
from autodeploy.server.requests import DetokenizeRequest, TokenizeRequest, TokenizeTextRequest
from autodeploy.server.routes import GenerationRoutes
from autodeploy.server.served import ServedModel

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM = {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}}
"""With `stream=true`, the answer is server-sent events; how OpenAPI 3.2 says so."""


def create_app(served: ServedModel, *, version: str = "", options: ServerOptions | None = None) -> FastAPI:
    """The app for one model. The caller shuts the engine down. Raises ConfigError for a chat template of no use."""
    options = options or ServerOptions()
    if options.chat_template is not None:
        served.use_chat_template(Path(options.chat_template).read_text(encoding="utf-8"))
    app = FastAPI(
        title="AutoDeploy", version=version or "unknown", docs_url=None, redoc_url=None, redirect_slashes=False
    )
    metrics = ServingMetrics(served)
    routes, generation = _Routes(served, metrics, version), GenerationRoutes(served, metrics, options)

    def add(method: str, path: str, route: Callable[..., Any], answer: Any = None, **extra: Any) -> None:
        errors = ERROR_RESPONSES_IN_JSON if "response_class" in extra else ERROR_RESPONSES
        responses = {**errors, **extra.pop("responses", {})}
        app.add_api_route(path, route, methods=[method], response_model=answer, responses=responses, **extra)

    add("GET", "/health", routes.health, response_class=Response)
    add("GET", "/ping", routes.health, response_class=Response)
    add("POST", "/ping", routes.health, response_class=Response)
    add("GET", "/ready", routes.ready, response_class=Response)
    add("GET", "/version", routes.show_version, VersionResponse)
    add("GET", "/metrics", routes.metrics, response_class=PlainTextResponse)
    add("GET", "/status", routes.status_page, response_class=HTMLResponse)
    add("GET", "/status.json", routes.status)
    add("GET", "/v1/models", routes.models, ModelList)
    add("GET", "/v1/models/{name:path}", routes.model, ModelCard)
    add("POST", "/tokenize", routes.tokenize, TokenizeResponse)
    add("POST", "/detokenize", routes.detokenize, DetokenizeResponse)
    add("POST", "/v1/completions", generation.completions, CompletionResponse, responses=STREAM)
    add("POST", "/v1/chat/completions", generation.chat_completions, ChatCompletionResponse, responses=STREAM)
    add_error_handlers(app)
    _add_middleware(app, options, served, metrics)
    return app


def _add_middleware(app: FastAPI, options: ServerOptions, served: ServedModel, metrics: ServingMetrics) -> None:
    """What is added last comes first: a request meets the log, then CORS, the key, the trace, and the limit."""
    app.add_middleware(LimitBody, max_bytes=options.max_body_bytes)
    if options.otlp_traces_endpoint is not None:
        from autodeploy.server.tracing import TraceRequests, tracer_provider

        provider = tracer_provider(options.otlp_traces_endpoint)
        served.lifecycle.at_end.append(provider.shutdown)
        app.add_middleware(TraceRequests, provider=provider)
    if options.api_key:
        app.add_middleware(RequireKey, keys=options.api_key)
    if options.allowed_origins:
        app.add_middleware(AllowOrigins, origins=options.allowed_origins)
    app.add_middleware(RequestLog, note_answer=metrics.note_answer)


class _Routes:
    """Everything that does not run the model."""

    def __init__(self, served: ServedModel, metrics: ServingMetrics, version: str):
        self._served = served
        self._metrics = metrics
        self._version = version
        self._started = int(time.time())
        self._prompts = PromptReader(served)
        self._page = status.PAGE.read_text(encoding="utf-8")

    async def health(self) -> Response:
        """200 while the engine makes progress, 503 once it has stopped or hangs."""
        if not self._served.engine.is_healthy:
            return error_response(503, "the engine has stopped or hangs", "server_error", code="engine_unhealthy")
        return Response(status_code=200)

    async def ready(self) -> Response:
        """200 while new requests are welcome: healthy and not shutting down. `/health` is about the process alone."""
        if self._served.lifecycle.is_draining:
            return error_response(503, "the server is shutting down", "server_error", code="draining")
        return await self.health()

    async def status_page(self) -> Response:
        """A page for people, which shows `/status.json`."""
        return Response(self._page, media_type="text/html", headers=status.HEADERS)

    async def status(self) -> dict[str, Any]:
        """Queue, batch, cache, counters and latencies."""
        return status.figures(self._served, self._metrics, self._version)

    async def show_version(self) -> VersionResponse:
        return VersionResponse(version=self._version)

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> ModelList:
        """The served names."""
        return ModelList(data=[self._card(name) for name in self._served.names])

    async def model(self, name: str) -> ModelCard:
        """One of the served names."""
        return self._card(self._served.checked_name(name))

    async def tokenize(self, body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text or a conversation."""
        self._served.checked_name(body.model)
        if isinstance(body, TokenizeTextRequest):
            token_ids = await self._prompts.encode_text(body.prompt, body.add_special_tokens) if body.prompt else []
        else:
            token_ids = await self._prompts.encode_chat(body)
        pieces = self._served.require_tokenizer("prompt").pieces(token_ids) if body.return_token_strs else None
        return TokenizeResponse(
            count=len(token_ids), max_model_len=self._served.max_model_len, tokens=token_ids, token_strs=pieces
        )

    async def detokenize(self, body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        self._served.checked_name(body.model)
        tokenizer = self._served.require_tokenizer("tokens")
        tokenizer.check_known(body.tokens, "tokens")
        return DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))

    def _card(self, name: str) -> ModelCard:
        limit = self._served.max_model_len
        return ModelCard(id=name, created=self._started, root=self._served.names[0], max_model_len=limit)
