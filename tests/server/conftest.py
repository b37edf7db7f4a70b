"""Servers for tests, stopped at their end."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from autodeploy.errors import EngineDeadError
from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.server.app import create_app
from autodeploy.server.options import ServerOptions, parse_server_options
from autodeploy.server.run import DrainingServer, HttpProtocol, make_server
from autodeploy.server.served import ServedModel
from tests.runtime.fake_engine import FakeEngine
from tests.server.running import ANSWER_IDS, EOS, TOKENIZER, VOCAB, Serve, Server, Start, wait_until


class _QuickServer(uvicorn.Server):
    """Looks every 10 ms whether it should end, instead of every 100: there are many servers to end."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers with the given engine; stops them all at the end."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []
    engines: list[tuple[AsyncEngine, Any]] = []  # of servers that were refused too

    def start_server(fake: Any = None, tokenizer: Any = TOKENIZER, **options: Any) -> Server:
        fake = fake or FakeEngine(ANSWER_IDS, eos_id=EOS)
        engine = AsyncEngine(fake, step_timeout_seconds=options.pop("step_timeout_seconds", 600))
        engines.append((engine, fake))
        grammars = None if tokenizer is None else GrammarCompiler(tokenizer, VOCAB, [EOS])
        served = ServedModel(
            engine=engine,
            names=["tiny", "alias"],
            tokenizer=tokenizer,
            max_model_len=fake.max_model_len,
            constraints=Constraints(grammars),
            default_sampling=options.pop("default_sampling", {}),
        )
        more = {name: options.pop(name) for name in ("ssl_keyfile", "ssl_certfile") if name in options}
        app = create_app(served, version="1.2.3", options=ServerOptions(**options))
        listener = socket.create_server(("127.0.0.1", 0))
        server = _QuickServer(
            uvicorn.Config(
                app, http=HttpProtocol, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, **more
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started)
        scheme = "https" if more else "http"
        return Server(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", fake, engine)

    yield start_server
    for _, fake in engines:
        if isinstance(fake, FakeEngine):
            fake.hold.clear()
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
    for engine, _ in engines:
        engine.shutdown()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers as the command line does, by their options; stops them all at the end."""
    # The real one would change the loggers of all tests that come after.
    monkeypatch.setattr("autodeploy.server.run.log_config", lambda log_format: None)
    started: list[tuple[DrainingServer, threading.Thread, AsyncEngine]] = []

    def serve_one(
        fake: Any, *, ended: list[BaseException] | None = None, **options: Any
    ) -> tuple[str, DrainingServer, ServedModel]:
        """`ended` gets the error that the server ends with, where that is expected."""
        engine = AsyncEngine(fake)
        served = ServedModel(engine=engine, names=["tiny"], tokenizer=TOKENIZER)
        parsed = parse_server_options({"port": 0, **options})
        server = make_server(create_app(served, options=parsed), served, parsed)

        def run() -> None:
            try:
                server.run()
            except EngineDeadError as error:
                if ended is None:
                    raise
                ended.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        started.append((server, thread, engine))
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}", server, served

    yield serve_one
    for server, thread, engine in started:
        server.should_exit = server.force_exit = True
        engine.shutdown()
        thread.join(10)
