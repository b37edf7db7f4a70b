"""Replicas behind one address, with Ray Serve: a model and options go in, an application for `serve.run` comes out.

    serve.run(autodeploy.ray.app({"model": "path/to/model", "num_replicas": 2}))

An ingress takes HTTP calls and hands each to a replica, which is the server of `autodeploy serve` without its socket.
Calls that begin alike go to the same replica, whose prefix cache knows them. What a dead replica had not begun to
answer is asked of another one. Needs the packages of `autodeploy[ray]`.
"""

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from autodeploy.config import parse_options
from autodeploy.errors import ConfigError, EngineDeadError
from autodeploy.server.failures import error_response
from autodeploy.server.in_process import Head, HttpCall, answer
from autodeploy.server.options import NAMES, ServerOptions, parse_server_options

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How many replicas a call is given to, one after another died with it."""

PREFIX_CHARACTERS = 1024
"""Calls whose texts are equal so far go to the same replica."""

LISTENING = frozenset({"host", "port", "ssl_keyfile", "ssl_certfile", "drain_timeout_seconds", "log_format"})
"""Options of a server with a socket of its own; here they are Ray's."""

OF_ONE_REPLICA = frozenset({"/metrics", "/status", "/status.json"})


@dataclass(frozen=True, kw_only=True)
class _Deployment:
    """Arguments of `app`.

    Attributes:
        num_replicas: processes, each with the whole model.
        num_cpus, num_gpus: of each replica; its kernels use as many threads as it has CPUs.
    """

    model: str
    num_replicas: int = 1
    num_cpus: float = 1
    num_gpus: float = 0


def app(arguments: Mapping[str, Any]) -> Any:
    """The application: `serve.run(app({...}))`, or `import_path: autodeploy.ray:app` in Serve's own configuration.

    Args:
        arguments: `model` (a checkpoint folder, a GGUF file, a hub id), `num_replicas`, `num_cpus`, `num_gpus`, and any
            options of the model and the server, by the names of `autodeploy serve`.
    Raises:
        ConfigError: an unknown name or a bad value.
    """
    own = {name: arguments[name] for name in _Deployment.__dataclass_fields__.keys() & arguments.keys()}
    if "model" not in own:
        raise ConfigError("an application needs a model: a checkpoint folder, a GGUF file or a hub id")
    chosen = _Deployment(**own)
    rest = {name: value for name, value in arguments.items() if name not in own}
    if foreign := LISTENING & rest.keys():
        raise ConfigError(f"{min(foreign)} is Ray Serve's business here: see HTTPOptions and deployment options of Ray")
    server = {name: rest.pop(name) for name in NAMES & rest.keys()}
    options, server_options = parse_options(rest), parse_server_options(server)
    replicas = serve.deployment(Replica).options(
        num_replicas=chosen.num_replicas,
        max_ongoing_requests=options.engine.max_num_seqs,
        ray_actor_options={"num_cpus": chosen.num_cpus, "num_gpus": chosen.num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
    )
    ingress = serve.deployment(Ingress).options(
        max_ongoing_requests=chosen.num_replicas * (options.engine.max_num_seqs + options.engine.max_queued_requests),
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(chosen.model, rest, server), server_options.max_body_bytes)


class Replica:
    """One deployed model in a process of its own."""

    def __init__(self, model: str, options: Mapping[str, Any], server: Mapping[str, Any]):
        # Only replicas need these: the ingress stays small.
        from autodeploy.llm import LLM
        from autodeploy.packaged_models import model_path
        from autodeploy.server.app import create_app
        from autodeploy.server.served import ServedModel

        self._llm = LLM(model_path(model), **options)
        server_options = parse_server_options(server)
        served = ServedModel(
            engine=self._llm.async_engine,
            names=server_options.served_model_name or [model],
            tokenizer=self._llm.tokenizer,
            max_model_len=self._llm.max_model_len,
            constraints=self._llm.constraints,
            default_sampling=self._llm.generation_defaults,
        )
        self._app = create_app(served, options=server_options)

    def check_health(self) -> None:
        """Asked by Ray, which puts a new replica in the place of one that raises."""
        if not self._llm.async_engine.is_healthy:
            raise EngineDeadError("the engine has stopped or hangs")

    async def answer(self, call: HttpCall) -> AsyncIterator[Head | bytes]:
        """The answer as it comes."""
        async for part in answer(self._app, call):
            yield part


class Ingress:
    """Takes HTTP calls from Ray's proxies and hands them to replicas."""

    def __init__(self, replicas: Any, max_body_bytes: int = ServerOptions.max_body_bytes):
        self._replicas = replicas.options(stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        path = request.scope["path"]
        if path in OF_ONE_REPLICA:
            return error_response(404, f"{path} would be that of one replica; see Ray's dashboard", "not_found_error")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body_bytes:
                message = f"the body is larger than {self._max_body_bytes} bytes"
                return error_response(413, message, "invalid_request_error")
        call = HttpCall(
            method=request.method,
            path=path,
            query=request.scope["query_string"],
            headers=list(request.scope["headers"]),
            body=bytes(body),
        )
        for _ in range(ATTEMPTS):
            parts = self._parts(call)
            try:
                head = await anext(parts)
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("a replica died before it answered: %s", error)
                continue
            assert isinstance(head, Head)
            response = StreamingResponse(self._body(parts, head), status_code=head.status)
            response.raw_headers = list(head.headers)
            return response
        return error_response(503, "no replica could answer; try again later", "server_error", code="no_replica")

    async def _parts(self, call: HttpCall) -> AsyncIterator[Head | bytes]:
        """The answer of a replica; dropped with the caller."""
        key = prefix_key(call.body)
        chosen = self._replicas if key is None else self._replicas.options(session_id=key)
        parts = chosen.answer.remote(call)
        try:
            async for part in parts:
                yield part
        finally:
            parts.cancel()

    @staticmethod
    async def _body(parts: AsyncIterator[Head | bytes], head: Head) -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                assert isinstance(part, bytes)
                yield part
        except RayActorError:
            logger.warning("a replica died in the middle of an answer")
            if not dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                raise
            detail = {"message": "the replica died; send the request again", "type": "server_error"}
            yield f"data: {json.dumps({'error': {**detail, 'param': None, 'code': None}})}\n\ndata: [DONE]\n\n".encode()


def prefix_key(body: bytes) -> str | None:
    """Equal for requests that begin alike: conversations by their first two messages, prompts by their beginning."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    beginning = fields["messages"][:2] if isinstance(fields.get("messages"), list) else fields.get("prompt")
    if not beginning:
        return None
    return hashlib.sha256(json.dumps(beginning)[:PREFIX_CHARACTERS].encode()).hexdigest()
