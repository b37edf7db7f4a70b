"""Whom the server answers: ASGI middleware that asks for a key, and that tells browsers whose pages may call."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from autodeploy.server.failures import error_response

OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/status"})
"""Asked by those who have no key: whoever watches the process. They tell nothing of requests or models."""


class RequireKey:
    """Refuses requests without one of the keys. The time it takes tells nothing of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_known(scope):
            refusal = error_response(
                401,
                "this server needs a key: send the header 'Authorization: Bearer KEY'",
                "invalid_request_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await refusal(scope, receive, send)
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        found = False
        for known in self._digests:  # all of them, so that a match is not faster
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == b"bearer"


class AllowOrigins(CORSMiddleware):
    """Answers browsers that ask whether a page of one of these origins may call."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # the official client's own headers are many, and cookies are none of them
            expose_headers=["X-Request-Id"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """A refusal has OpenAI's shape, as every other."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return error_response(response.status_code, bytes(response.body).decode(), "invalid_request_error")
