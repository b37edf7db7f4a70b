"""The FastAPI app: an engine, a tokenizer and a model's name go in, OpenAI's routes come out."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import Response

from autodeploy.server.answers import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
)
from autodeploy.server.failures import ERROR_RESPONSES, add_error_handlers, error_response
from autodeploy.server.limits import LimitBody
from autodeploy.server.metrics import EngineMetrics
from autodeploy.server.prompts import PromptReader
from autodeploy.server.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from autodeploy.server.routes import GenerationRoutes
from autodeploy.server.served import ServedModel

MAX_BODY_BYTES = 8 * 2**20
STREAM = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
"""With `stream=true`, the answer is server-sent events."""


def create_app(served: ServedModel, *, version: str = "", max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The app for one model. The caller shuts the engine down."""
    app = FastAPI(title="AutoDeploy", version=version or "unknown", docs_url=None, redoc_url=None)
    routes, generation = _Routes(served, version), GenerationRoutes(served)

    def add(method: str, path: str, route: Callable[..., Any], answer: Any = None, **extra: Any) -> None:
        responses = {**ERROR_RESPONSES, **extra.pop("responses", {})}
        app.add_api_route(path, route, methods=[method], response_model=answer, responses=responses, **extra)

    add("GET", "/health", routes.health)
    add("GET", "/ping", routes.health)
    add("POST", "/ping", routes.health)
    add("GET", "/version", routes.show_version, VersionResponse)
    add("GET", "/metrics", routes.metrics)
    add("GET", "/v1/models", routes.models, ModelList)
    add("GET", "/v1/models/{name:path}", routes.model, ModelCard)
    add("POST", "/tokenize", routes.tokenize, TokenizeResponse)
    add("POST", "/detokenize", routes.detokenize, DetokenizeResponse)
    add("POST", "/v1/completions", generation.completions, CompletionResponse, responses=STREAM)
    add("POST", "/v1/chat/completions", generation.chat_completions, ChatCompletionResponse, responses=STREAM)
    app.add_middleware(LimitBody, max_bytes=max_body_bytes)
    add_error_handlers(app)
    return app


class _Routes:
    """Everything that does not run the model."""

    def __init__(self, served: ServedModel, version: str):
        self._served = served
        self._version = version
        self._started = int(time.time())
        self._prompts = PromptReader(served)
        self._registry = CollectorRegistry()
        self._registry.register(EngineMetrics(served))

    async def health(self) -> Response:
        """200 while the engine makes progress, 503 once it has stopped or hangs."""
        if not self._served.engine.is_healthy:
            return error_response(503, "the engine has stopped or hangs", "server_error", code="engine_unhealthy")
        return Response(status_code=200)

    async def show_version(self) -> VersionResponse:
        return VersionResponse(version=self._version)

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> ModelList:
        """The served names."""
        return ModelList(data=[self._card(name) for name in self._served.names])

    async def model(self, name: str) -> ModelCard:
        """One of the served names."""
        return self._card(self._served.checked_name(name))

    async def tokenize(self, body: TokenizeTextRequest | TokenizeChatRequest) -> TokenizeResponse:
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
