"""The FastAPI app: an engine, a tokenizer and a model's name go in, OpenAI's routes come out.

Every answer that is not a success has OpenAI's error shape. A client that goes away takes its requests with it.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autodeploy.errors import AutoDeployError, EngineDeadError, EngineOverloadedError, InvalidRequestError
from autodeploy.outputs import OutputCollector
from autodeploy.runtime.async_engine import AsyncEngine, TokenStream
from autodeploy.runtime.request import MAX_SEQUENCES_PER_REQUEST, SamplingParams
from autodeploy.runtime.tokenizer import Tokenizer
from autodeploy.server import streaming
from autodeploy.server.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    ErrorDetail,
    ErrorResponse,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
CLIENT_CLOSED_REQUEST = 499
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 405, 413, 422, 429, 500, 503)
}

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the routes work with.

    Attributes:
        names: names that clients may ask for; the first is the one answers carry.
        tokenizer: None serves token ids only.
        max_model_len: longest context in tokens, told to clients.
        default_sampling: `SamplingParams` values for what a request leaves out.
    """

    engine: AsyncEngine
    names: Sequence[str]
    tokenizer: Tokenizer | None = None
    max_model_len: int | None = None
    default_sampling: Mapping[str, Any] = field(default_factory=dict)


def create_app(served: ServedModel, *, version: str = "", max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The app for one model. The caller shuts the engine down."""
    app = FastAPI(title="AutoDeploy", version=version or "unknown", docs_url=None, redoc_url=None)
    routes = _Routes(served, version)
    add = partial(app.add_api_route, responses=ERROR_RESPONSES)
    add("/health", routes.health, methods=["GET"])
    add("/version", routes.show_version, methods=["GET"])
    add("/metrics", routes.metrics, methods=["GET"])
    add("/v1/models", routes.models, methods=["GET"])
    add("/v1/completions", routes.completions, methods=["POST"], response_model=CompletionResponse)
    add("/v1/chat/completions", routes.chat_completions, methods=["POST"], response_model=ChatCompletionResponse)
    app.add_middleware(_LimitBody, max_bytes=max_body_bytes)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(AutoDeployError, _on_own_error)
    app.add_exception_handler(Exception, _on_unexpected_error)
    return app


class _Routes:
    def __init__(self, served: ServedModel, version: str):
        self._served = served
        self._version = version
        self._started = int(time.time())
        self._names = streaming.TokenNames(served.tokenizer)
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(served))

    async def health(self) -> Response:
        """200 while the engine makes progress, 503 once it has stopped or hangs."""
        if not self._served.engine.is_healthy:
            return error_response(503, "the engine has stopped or hangs", "server_error", code="engine_unhealthy")
        return Response(status_code=200)

    async def show_version(self) -> dict[str, str]:
        return {"version": self._version}

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        """The served names."""
        common = {"object": "model", "created": self._started, "owned_by": "autodeploy"}
        limit = {"max_model_len": self._served.max_model_len}
        return {"object": "list", "data": [{"id": name} | common | limit for name in self._served.names]}

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        model = self._check_model(body.model)
        params = body.sampling_params(self._served.default_sampling)
        prompts = body.prompts()
        if not prompts:
            raise InvalidRequestError("the prompt is empty; give at least one", "prompt")
        if len(prompts) * params.n > MAX_SEQUENCES_PER_REQUEST:
            raise InvalidRequestError(
                f"{len(prompts)} prompts times n={params.n} are more than {MAX_SEQUENCES_PER_REQUEST} sequences; "
                "send several requests",
                "prompt",
            )
        token_ids = [await self._encode(prompt) for prompt in prompts]
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        if body.stream:
            generation = await until_disconnect(
                request.receive, self._start(answer_id, token_ids, params, body.priority)
            )
            usage = body.wants_usage
            chunks = streaming.completion_chunks(answer_id, model, generation, self._names, usage)
            return _EventStream(streaming.server_sent_events(chunks), generation.stream)

        async def whole() -> Response:
            generation = await self._start(answer_id, token_ids, params, body.priority)
            with generation.stream:
                outputs = await generation.finish()
            answer = streaming.completion_response(answer_id, model, outputs, generation.usage(), self._names)
            return Response(answer.model_dump_json(), media_type="application/json")

        return await until_disconnect(request.receive, whole())

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        model = self._check_model(body.model)
        params = body.sampling_params(self._served.default_sampling)
        token_ids = [await self._encode_chat(body)]
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        top = body.top_logprobs or 0
        if body.stream:
            generation = await until_disconnect(
                request.receive, self._start(answer_id, token_ids, params, body.priority)
            )
            usage = body.wants_usage
            chunks = streaming.chat_chunks(answer_id, model, generation, self._names, usage, top)
            return _EventStream(streaming.server_sent_events(chunks), generation.stream)

        async def whole() -> Response:
            generation = await self._start(answer_id, token_ids, params, body.priority)
            with generation.stream:
                outputs = await generation.finish()
            answer = streaming.chat_response(answer_id, model, outputs, generation.usage(), self._names, top)
            return Response(answer.model_dump_json(), media_type="application/json")

        return await until_disconnect(request.receive, whole())

    def _check_model(self, name: str | None) -> str:
        """The name an answer carries. Raises HTTPException 404 for a model that is not served."""
        if name is not None and name not in self._served.names:
            raise HTTPException(
                404, f"the model {name[:200]!r} does not exist; served: {', '.join(self._served.names)}"
            )
        return name or self._served.names[0]

    async def _encode(self, prompt: str | list[int]) -> list[int]:
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one character or token", "prompt")
        if isinstance(prompt, list):
            return prompt
        # In a thread: a long text must not hold up everybody else's streams.
        return await asyncio.to_thread(self._tokenizer("prompt").encode, prompt)

    async def _encode_chat(self, body: ChatCompletionRequest) -> list[int]:
        render = partial(
            self._tokenizer("messages").apply_chat_template,
            [message.as_template_input() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            trust_messages=False,
        )
        return await asyncio.to_thread(render)

    def _tokenizer(self, parameter: str) -> Tokenizer:
        if self._served.tokenizer is None:
            raise InvalidRequestError("this server has no tokenizer; send prompts as token ids", parameter)
        return self._served.tokenizer

    async def _start(
        self, answer_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams, priority: int | None
    ) -> streaming.Generation:
        """Give all prompts to the engine; the engine has accepted all of them, or none when an error is raised."""
        stream = self._served.engine.open()
        collectors = []
        try:
            for position, token_ids in enumerate(prompts):
                request_id = f"{answer_id}-{position}"
                await stream.add(request_id, token_ids, params, priority=priority or 0)
                abort = partial(stream.abort, request_id)
                collectors.append(OutputCollector(request_id, token_ids, params, self._served.tokenizer, abort))
        except BaseException:
            stream.close()
            raise
        return streaming.Generation(stream, collectors)


class ClientDisconnectedError(Exception):
    """The client went away; nobody reads the answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`; cancel it when the client goes away (ClientDisconnectedError)."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events of a token stream, which is closed whichever way the answer ends."""

    def __init__(self, events: AsyncIterator[str], stream: TokenStream):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._token_stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self.stream_response(send))
        except (ClientDisconnectedError, OSError):
            logger.info("a client went away before its answer was complete")
        finally:
            self._token_stream.close()


class _LimitBody:
    """ASGI middleware that refuses bodies beyond a number of bytes, before they are read into memory."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        message = f"the body is larger than {self._max_bytes} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            return await error_response(413, message, "invalid_request_error")(scope, receive, send)
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            event = await receive()
            received += len(event.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, message)
            return event

        await self._app(scope, receive_limited, send)


class _EngineMetrics:
    """Reads the engine's counters whenever they are asked for, under the names that dashboards for vLLM use."""

    def __init__(self, served: ServedModel):
        self._served = served

    def collect(self) -> Iterable[Metric]:
        stats = self._served.engine.stats()
        gauges = (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences waiting to run.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the state memory in use; 1 means all.", stats.state_usage_fraction),
        )
        counters = (
            ("num_preemptions", "Sequences put back to waiting for lack of memory.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        )
        for kind, entries in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, help_text, value in entries:
                metric = kind(f"vllm:{name}", help_text, labels=["model_name"])
                metric.add_metric([self._served.names[0]], float(value))
                yield metric


def error_response(
    status: int,
    message: str,
    kind: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer in OpenAI's error shape. Escaped to ASCII, since a message may quote what is not valid Unicode."""
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    body = json.dumps({"error": {name: getattr(detail, name) for name in ErrorDetail.model_fields}})
    return Response(body, status_code=status, media_type="application/json", headers=dict(headers or {}))


async def _on_http_error(request: Request, error: Exception) -> Response:
    status, detail, headers = 500, "internal error", None
    if isinstance(error, HTTPException):
        status, detail, headers = error.status_code, str(error.detail), error.headers
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 404 and detail == "Not Found":
        detail = f"no such path: {request.method} {request.url.path[:200]}"
    code = "model_not_found" if status == 404 and "model" in detail else None
    return error_response(status, detail, kind, code=code, headers=headers)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    # Of the alternatives of a union, our own words say most, and then the one that went deepest.
    first: Mapping[str, Any] = max(
        errors, key=lambda entry: (_own_cause(entry) is not None, len(entry.get("loc", ()))), default={}
    )
    cause = _own_cause(first)
    if cause is not None:
        return _invalid_request(cause)
    if first.get("type") == "json_invalid":
        what = first.get("ctx", {}).get("error", "cannot be parsed")
        return error_response(400, f"the body is not valid JSON: {what}", "invalid_request_error")
    where = [str(part) for part in first.get("loc", ())[1:]]
    param = where[0] if where else None
    message = f"{'.'.join(where) or 'the body'}: {first.get('msg', 'is not valid')}"
    return error_response(400, message, "invalid_request_error", param=param)


def _own_cause(entry: Mapping[str, Any]) -> InvalidRequestError | None:
    cause = entry.get("ctx", {}).get("error")
    return cause if isinstance(cause, InvalidRequestError) else None


def _invalid_request(error: InvalidRequestError) -> Response:
    param = "prompt" if error.parameter == "prompt_token_ids" else error.parameter
    return error_response(400, str(error), "invalid_request_error", param=param)


async def _on_own_error(request: Request, error: Exception) -> Response:
    if isinstance(error, InvalidRequestError):
        return _invalid_request(error)
    if isinstance(error, EngineOverloadedError):
        return error_response(429, str(error), "rate_limit_error", code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, EngineDeadError):
        return error_response(503, streaming.public_message(error), "server_error", code="engine_dead")
    logger.error("a request failed: %s", error)
    message = streaming.public_message(error) if isinstance(error, AutoDeployError) else "internal error"
    return error_response(500, message, "server_error")


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnectedError):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    # The text of an unexpected exception stays in the log: it may hold what is not the client's business.
    return error_response(500, "internal error; the server's log has the details", "server_error")
