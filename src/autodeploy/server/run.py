"""Runs the app with uvicorn until a signal ends it: first it stops taking requests, then those that run may finish."""

import asyncio
import logging
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from autodeploy.errors import EngineDeadError
from autodeploy.server.failures import error_response
from autodeploy.server.logs import log_config
from autodeploy.server.options import ServerOptions
from autodeploy.server.served import ServedModel

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10
"""After requests were cut off, for their errors to be sent."""

KEEP_ALIVE_SECONDS = 75
"""A connection stays open so long between two requests: longer than clients keep one to use again (httpx, and with it
the `openai` package, 5 s, aiohttp 15 s, proxies 60 s), so that it is they who close it and no request meets a close."""

STALLED_READER_SECONDS = 60
"""A client that takes nothing of its answer for so long has gone, as far as the server is concerned."""


SLOW_SENDER_SECONDS = 60
"""A connection is closed when its first request is not there by then, or a later one that long after its first byte."""


class HttpProtocol(H11Protocol):
    """HTTP as h11 reads it, which bounds headers. What is no HTTP at all is answered in OpenAI's shape too.

    Who opens connections and does not send a whole request in `SLOW_SENDER_SECONDS` loses them: a process can have only
    so many.
    """

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit = self.loop.call_later(SLOW_SENDER_SECONDS, transport.close)

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        if state not in (h11.IDLE, h11.SEND_BODY):  # the request is whole
            self._end_limit()
        elif self._limit is None and (state is h11.SEND_BODY or self.conn.trailing_data[0]):
            self._limit = self.loop.call_later(SLOW_SENDER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_limit()
        super().connection_lost(exc)

    def _end_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def send_400_response(self, msg: str) -> None:
        response = error_response(400, msg, "invalid_request_error", headers={"Connection": "close"})
        head = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: no new connections, `/ready` says no, what runs has `drain_timeout_seconds`.

    What is not finished by then ends with an error that says so; a second SIGINT ends everything at once. A client that
    takes nothing of its answer for `STALLED_READER_SECONDS` is disconnected. When the engine fails, the server tells
    everybody and ends with an error, so that whoever watches the process starts a new one.
    """

    def __init__(self, config: uvicorn.Config, served: ServedModel, drain_timeout_seconds: float):
        super().__init__(config)
        self._served = served
        self._drain_timeout_seconds = drain_timeout_seconds

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end. Raises EngineDeadError when that is the engine's."""
        super().run(sockets)
        if self._served.engine.has_failed:
            raise EngineDeadError("the engine stopped, and the server with it; the log has the reason")

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._served.engine.has_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # The system ends connections whose peer takes nothing: what was to be sent would fill memory for ever.
        for listener in (listener for server in self.servers for listener in server.sockets):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_READER_SECONDS * 1000)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.lifecycle.is_draining = True
        logger.info("shutting down: requests that run may take %g more seconds", self._drain_timeout_seconds)
        cut_off = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            cut_off.cancel()
            for end in self._served.lifecycle.at_end:
                await asyncio.to_thread(end)

    async def _cut_off(self) -> None:
        await asyncio.sleep(self._drain_timeout_seconds)
        logger.warning("the time to finish is over; requests that still run end with an error")
        await asyncio.to_thread(self._served.engine.shutdown)


def make_server(app: FastAPI, served: ServedModel, options: ServerOptions, **more: Any) -> DrainingServer:
    """The server, not running yet."""
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_config=log_config(options.log_format),
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(options.drain_timeout_seconds) + GRACE_SECONDS,
        **more,
    )
    return DrainingServer(config, served, options.drain_timeout_seconds)
