"""Everything that is not a success: exceptions go in, answers in OpenAI's error shape come out."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from autodeploy.errors import AutoDeployError, EngineDeadError, EngineOverloadedError, InvalidRequestError
from autodeploy.server.answers import ErrorDetail, ErrorResponse

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
RETRY_AFTER_SECONDS = {429: 1, 503: 10}
"""What `Retry-After` says: a queue moves within a second, a process that is started anew loads its model first."""
ERROR_STATUSES = (400, 401, 404, 405, 413, 415, 422, 429, 500, 503)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ERROR_STATUSES}
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
ERROR_RESPONSES_IN_JSON: dict[int | str, dict[str, Any]] = {
    status: {"description": "An error", "content": _ERROR_CONTENT} for status in ERROR_STATUSES
}
"""The same for routes whose successes are not JSON: FastAPI would give their errors the type of their successes."""

_NO_OBJECT = ("missing", "model_attributes_type", "dict_type")
"""What the check of a whole body says of one that is no object."""


class RequestFailedError(AutoDeployError):
    """The engine gave up on one request; the message is the engine's reason."""


class ClientDisconnectedError(Exception):
    """The client went away; nobody reads the answer."""


def public_message(error: AutoDeployError) -> str:
    """What a client may read of a failure; what else an exception says stays in the log."""
    if isinstance(error, RequestFailedError):
        return f"the request failed: {error}"
    return "the engine has stopped" if isinstance(error, EngineDeadError) else "the request failed"


def error_response(
    status: int,
    message: str,
    kind: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer in OpenAI's error shape, with `Retry-After` where it may be another one soon.

    Escaped to ASCII, since a message may quote what is not valid Unicode.
    """
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    body = json.dumps({"error": {name: getattr(detail, name) for name in ErrorDetail.model_fields}})
    all_headers = dict(headers or {})
    if status in RETRY_AFTER_SECONDS:
        all_headers["Retry-After"] = str(RETRY_AFTER_SECONDS[status])
    return Response(body, status_code=status, media_type="application/json", headers=all_headers)


def add_error_handlers(app: FastAPI) -> None:
    """From now on, every failure of a route has OpenAI's shape."""
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(AutoDeployError, _on_own_error)
    app.add_exception_handler(ClientDisconnectedError, _on_client_gone)
    app.add_exception_handler(Exception, _on_unexpected_error)


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
    # Where a body may be one of several models, the model's name comes first.
    where = [str(part) for part in first.get("loc", ())[1:] if not str(part).endswith("Request")]
    if not where and first.get("type") in _NO_OBJECT:
        return _on_no_object(request)
    param = where[0] if where else None
    message = f"{'.'.join(where) or 'the body'}: {first.get('msg', 'is not valid')}"
    return error_response(400, message, "invalid_request_error", param=param)


def _on_no_object(request: Request) -> Response:
    """Bodies that are not declared as JSON are not read as JSON."""
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type == "application/json" or media_type.endswith("+json"):
        return error_response(400, "the body must be a JSON object", "invalid_request_error")
    message = f"send a JSON object with the header 'Content-Type: application/json'; found {given[:100]!r}"
    return error_response(415, message, "invalid_request_error")


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
        return error_response(429, str(error), "rate_limit_error", code="overloaded")
    if isinstance(error, EngineDeadError):
        return error_response(503, public_message(error), "server_error", code="engine_dead")
    logger.error("a request failed: %s", error)
    message = public_message(error) if isinstance(error, AutoDeployError) else "internal error"
    return error_response(500, message, "server_error")


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    return unexpected_error()


def unexpected_error() -> Response:
    """What a client reads of a fault of ours."""
    # The text of an unexpected exception stays in the log: it may hold what is not the client's business.
    return error_response(500, "internal error; the server's log has the details", "server_error")
