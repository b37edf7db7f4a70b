"""Replicas behind one address, with Ray Serve: a model and options go in, an application for `serve.run` comes out.

    serve.run(autodeploy.ray.app({"model": "path/to/model", "num_replicas": 2}))

An ingress takes HTTP calls and hands each to a replica, which is the server of `autodeploy serve` without its socket.
Calls that begin alike go to the same replica, whose prefix cache knows them. What a dead replica had not begun to
answer is asked of another one. Needs the packages of `autodeploy[ray]`.
"""

import asyncio
import dataclasses
import hashlib
import importlib.util
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

WAITS_SECONDS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Before each attempt to give a call to a replica; one that died Ray may still offer for a moment."""

PREFIX_CHARACTERS = 1024
"""Calls whose texts are equal so far go to the same replica."""

TREE_CHARACTERS = 16_384
"""What Ray's tree of prefixes keeps of each call's text."""

PREFIX_TREE_ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
"""Where Ray 2.60 has its router by prefixes. The public name, `ray.serve.llm.request_router`, imports all of Ray's own
language model server, whose packages nothing else here needs."""

REPLICA_HEADER = b"x-replica-id"
"""Of every answer: Ray's name of the replica that gave it."""

LISTENING = frozenset({"host", "port", "ssl_keyfile", "ssl_certfile", "drain_timeout_seconds", "log_format"})
"""Options of a server with a socket of its own; here they are Ray's."""

OF_ONE_REPLICA = frozenset({"/metrics", "/status", "/status.json"})


@dataclass(frozen=True, kw_only=True)
class _Deployment:
    """Arguments of `app`.

    Attributes:
        num_replicas: processes, each with the whole model.
        num_cpus, num_gpus: of each replica; its kernels use as many threads as it has CPUs.
        routing: `hash`: what begins alike goes to the same replica until that is full. `prefix_tree`: Ray's
            PrefixCacheAffinityRouter, which sends a call where most of its beginning has been before, while no replica
            has many more calls than another.
    """

    model: str
    num_replicas: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    routing: str = "hash"


@dataclass(frozen=True, kw_only=True)
class _RoutedCall(HttpCall):
    """A call with what Ray's router by prefixes reads of it; never empty."""

    prompt: str


def app(arguments: Mapping[str, Any]) -> Any:
    """The application: `serve.run(app({...}))`, or `import_path: autodeploy.ray:app` in Serve's own configuration.

    Args:
        arguments: `model` (a checkpoint folder, a GGUF file, a hub id), `num_replicas`, `num_cpus`, `num_gpus`,
            `routing` (`hash` or `prefix_tree`), and any options of the model and the server, by the names of
            `autodeploy serve`.
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
        request_router_config=_router(chosen.routing, options.engine.max_num_seqs),
    )
    ingress = serve.deployment(Ingress).options(
        max_ongoing_requests=chosen.num_replicas * (options.engine.max_num_seqs + options.engine.max_queued_requests),
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(chosen.model, rest, server), server_options.max_body_bytes)


def _router(routing: str, max_num_seqs: int) -> RequestRouterConfig:
    if routing == "hash":
        return RequestRouterConfig(request_router_class=ConsistentHashRouter)
    if routing != "prefix_tree":
        raise ConfigError(f"routing is {routing!r}; it must be 'hash' or 'prefix_tree'")
    try:
        found = importlib.util.find_spec(PREFIX_TREE_ROUTER)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError("the installed Ray has no router by prefixes where Ray 2.60 has it; use routing='hash'")
    return RequestRouterConfig(
        request_router_class=f"{PREFIX_TREE_ROUTER}.PrefixCacheAffinityRouter",
        request_router_kwargs={"imbalanced_threshold": max(1, max_num_seqs // 2), "do_eviction": True},
    )


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
        self._own_header = (REPLICA_HEADER, serve.get_replica_context().replica_id.unique_id.encode())

    def check_health(self) -> None:
        """Asked by Ray, which puts a new replica in the place of one that raises."""
        if not self._llm.async_engine.is_healthy:
            raise EngineDeadError("the engine has stopped or hangs")

    async def answer(self, call: HttpCall) -> AsyncIterator[Head | bytes]:
        """The answer as it comes."""
        async for part in answer(self._app, call):
            if isinstance(part, Head):
                part = dataclasses.replace(part, headers=[*part.headers, self._own_header])
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
        asked = prompt_of(bytes(body))
        key = prefix_key(asked)
        call = _RoutedCall(
            method=request.method,
            path=path,
            query=request.scope["query_string"],
            headers=list(request.scope["headers"]),
            body=bytes(body),
            prompt=prompt_text(asked)[:TREE_CHARACTERS] or path,
        )
        for wait_seconds in WAITS_SECONDS:
            await asyncio.sleep(wait_seconds)
            parts = self._parts(call, key)
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

    async def _parts(self, call: HttpCall, key: str | None) -> AsyncIterator[Head | bytes]:
        """The answer of a replica; dropped with the caller."""
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


def prompt_of(body: bytes) -> Any:
    """The messages or the prompt of a request; None where there is nothing of the kind."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return fields["messages"] if isinstance(fields.get("messages"), list) else fields.get("prompt")


def prefix_key(asked: Any) -> str | None:
    """Equal for requests that begin alike: conversations by their first two messages, prompts by their beginning."""
    if not asked:
        return None
    beginning = asked[:2] if isinstance(asked, list) and isinstance(asked[0], dict) else asked
    return hashlib.sha256(json.dumps(beginning)[:PREFIX_CHARACTERS].encode()).hexdigest()


def prompt_text(asked: Any) -> str:
    """What a request says, without the JSON around it, which is alike in all of them."""
    if isinstance(asked, list):
        return " ".join(str(part.get("content")) if isinstance(part, dict) else str(part) for part in asked)
    return str(asked or "")
