"""An ASGI app without a socket: an HTTP call goes in, its status and headers come out, then its body piece by piece."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, kw_only=True)
class HttpCall:
    """One HTTP request as plain data. `path` and `query` as ASGI has them, header names in lower case."""

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Head:
    """How an answer begins."""

    status: int
    headers: Headers


async def answer(app: ASGIApp, call: HttpCall) -> AsyncIterator[Head | bytes]:
    """The answer as it comes. Whoever stops taking it is a client that goes away.

    Raises:
        Exception: what the app raised; before the head, it answered nothing.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=1)
    arrived = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if arrived:
            return arrived.pop()
        await asyncio.Event().wait()  # for ever: when the caller goes away, the app is cancelled
        raise AssertionError

    async def run() -> None:
        try:
            await app(_scope(call), receive, messages.put)
        finally:
            await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(status=message["status"], headers=list(message.get("headers", ())))
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        task.cancel()
        with suppress(asyncio.QueueEmpty):
            messages.get_nowait()  # room for the app's last word
        await asyncio.gather(task, return_exceptions=True)


def _scope(call: HttpCall) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
        "state": {},
    }
