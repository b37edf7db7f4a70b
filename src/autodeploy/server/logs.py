"""Logs: every request gets an id and one line, as text or as JSON; lines written meanwhile carry the id too."""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autodeploy.server.failures import unexpected_error

logger = logging.getLogger("autodeploy.requests")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that is being served."""

_VALID_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_QUIET_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/status.json"})


class RequestLog:
    """ASGI middleware: takes or makes a request's id, answers with it, and writes a line when it is over.

    Args:
        note_answer: is told every request's method, route ("none" for paths of no route) and status.
    """

    def __init__(self, app: ASGIApp, note_answer: Callable[[str, str, int], None]):
        self._app = app
        self._note_answer = note_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode() if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        token = REQUEST_ID.set(request_id)
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("a request failed for an unexpected reason")
            if not status:
                await unexpected_error()(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET_PATHS and status < 400 else logging.INFO
            facts = {"method": scope["method"], "path": scope["path"][:200], "status": status}
            seconds = round(time.monotonic() - began, 6)
            logger.log(level, "%(method)s %(path)s %(status)s", facts, extra={"facts": {**facts, "seconds": seconds}})
            self._note_answer(scope["method"], getattr(scope.get("route"), "path", "none"), status)
            REQUEST_ID.reset(token)


class TextLines(logging.Formatter):
    """`time level [request id] logger: message`. Control characters are escaped: a line stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname} [{REQUEST_ID.get()}] {record.name}: "
        text = head + _escaped(record.getMessage())
        seconds = getattr(record, "facts", {}).get("seconds")
        text += "" if seconds is None else f" {seconds:.3f}s"
        return text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": REQUEST_ID.get(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info is not None:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)


def log_config(log_format: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`, and so for uvicorn."""
    formatter = JsonLines if log_format == "json" else TextLines
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stderr"}},
        "loggers": {
            name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("autodeploy", "uvicorn")
        },
    }


def _escaped(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
