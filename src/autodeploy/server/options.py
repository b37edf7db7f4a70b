"""How the server listens and whom it lets in: options of `autodeploy serve`, by flag or from a YAML file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeploy import env
from autodeploy.errors import ConfigError

MAX_BODY_BYTES = 8 * 2**20
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server listens and whom it lets in.

    Attributes:
        host: address to listen on. Others than this machine reach it on another one, e.g. 0.0.0.0: then set a key.
        port: port to listen on; 0 takes a free one.
        served_model_name: name that clients ask for; may be given several times. Default: MODEL as given.
        chat_template: file with the chat template, in Jinja, in the place of the model's own.
        api_key: key that clients must send; may be given several times. Better: the variable AUTODEPLOY_API_KEY.
        ssl_keyfile: private key in PEM form, for HTTPS; with ssl_certfile.
        ssl_certfile: certificate in PEM form, for HTTPS; with ssl_keyfile.
        allowed_origins: web pages of this origin may call the server; may be given several times. Default: none.
        max_body_bytes: largest body of a request.
        max_sequences_per_request: most prompts times n of one request.
        request_timeout_seconds: what takes longer ends with finish_reason "timeout"; default: no limit.
        drain_timeout_seconds: after SIGTERM, how long requests that run may take before they end with an error.
        log_format: text or json, one line per request.
        otlp_traces_endpoint: URL that spans are sent to, by OTLP over HTTP, one per request; needs autodeploy[tracing].
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: Sequence[str] = ()
    chat_template: str | None = None
    api_key: Sequence[str] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    allowed_origins: Sequence[str] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    max_sequences_per_request: int = 128
    request_timeout_seconds: float | None = None
    drain_timeout_seconds: float = 30.0
    log_format: str = "text"
    otlp_traces_endpoint: str | None = None


NAMES = frozenset(field.name for field in dataclasses.fields(ServerOptions))


def parse_server_options(values: Mapping[str, Any]) -> ServerOptions:
    """Options by name. A list may be given as one text.

    Raises:
        ConfigError: an unknown name, or a bad value.
    """
    unknown = values.keys() - NAMES
    if unknown:
        raise ConfigError(f"unknown server option {min(unknown)!r}; known: {', '.join(sorted(NAMES))}")
    given = dict(values)
    for name in ("served_model_name", "api_key", "allowed_origins"):
        if name in given:
            given[name] = _texts(name, given[name])
    options = ServerOptions(**given)
    _check(options)
    return options


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{name} must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _check(options: ServerOptions) -> None:
    if not isinstance(options.host, str) or not options.host:
        raise ConfigError(f"host must be an address, got {options.host!r}")
    for name, low, high in (("port", 0, 65535), ("max_body_bytes", 1, 2**40), ("max_sequences_per_request", 1, 128)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    for name in ("drain_timeout_seconds", "request_timeout_seconds"):
        seconds = getattr(options, name)
        if seconds is None and name == "request_timeout_seconds":
            continue
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 86_400:
            raise ConfigError(f"{name} must be a number from 0 to 86400, got {seconds!r}")
    if options.log_format not in LOG_FORMATS:
        raise ConfigError(f"log_format must be one of {', '.join(LOG_FORMATS)}; got {options.log_format!r}")
    if any(not key.isascii() or not key.isprintable() for key in options.api_key):
        raise ConfigError("api_key must be printable ASCII characters, since it is sent in a header")
    if options.otlp_traces_endpoint is not None:
        _check_tracing(options.otlp_traces_endpoint)
    if (options.ssl_keyfile is None) != (options.ssl_certfile is None):
        raise ConfigError("ssl_keyfile and ssl_certfile belong together; give both or none")
    for name in ("ssl_keyfile", "ssl_certfile", "chat_template"):
        path = getattr(options, name)
        if path is not None and not (isinstance(path, str) and Path(path).is_file()):
            raise ConfigError(f"{name}: there is no file {path}")


def _check_tracing(endpoint: object) -> None:
    """Said before a model is loaded: whether spans can be sent."""
    if not isinstance(endpoint, str) or not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp_traces_endpoint must be a URL such as http://HOST:4318/v1/traces, got {endpoint!r}")
    protocol = env.otlp_protocol()
    if protocol not in (None, "http/protobuf"):
        raise ConfigError(
            f"OpenTelemetry's variables ask for the protocol {protocol!r}; spans are sent by http/protobuf alone: "
            "set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL to it, and name the collector's port for HTTP"
        )
    try:
        import autodeploy.server.tracing  # noqa: F401  # only to see whether its packages are there
    except ModuleNotFoundError as error:
        raise ConfigError(f"otlp_traces_endpoint needs {error.name!r}: pip install 'autodeploy[tracing]'") from error
