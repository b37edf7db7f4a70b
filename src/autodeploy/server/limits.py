"""ASGI middleware that refuses what is too large, before it is read into memory."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autodeploy.server.failures import error_response


class LimitBody:
    """Refuses bodies beyond a number of bytes, before they are read into memory."""

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
