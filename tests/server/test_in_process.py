"""An app without a socket: its answers are those that it gives over one, piece by piece; who leaves ends the work."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.server.app import create_app
from autodeploy.server.in_process import Head, HttpCall, answer
from autodeploy.server.served import ServedModel
from tests.runtime.fake_engine import FakeEngine
from tests.server.running import ANSWER, ANSWER_IDS, EOS, TOKENIZER, wait_until

JSON = ((b"content-type", b"application/json"),)


async def parts_of(app: Any, call: HttpCall) -> list[Any]:
    return [part async for part in answer(app, call)]


def served_app(fake: FakeEngine) -> tuple[Any, AsyncEngine]:
    engine = AsyncEngine(fake)
    return create_app(ServedModel(engine=engine, names=["tiny"], tokenizer=TOKENIZER)), engine


def test_the_server_answers_whole_and_streamed() -> None:
    app, engine = served_app(FakeEngine(ANSWER_IDS, eos_id=EOS))
    call = HttpCall(method="POST", path="/v1/completions", headers=JSON, body=b'{"prompt": "x", "max_tokens": 99}')
    head, *body = asyncio.run(parts_of(app, call))
    assert head.status == 200 and dict(head.headers)[b"content-type"] == b"application/json"
    assert ANSWER.encode() in b"".join(body)
    call = HttpCall(method="POST", path="/v1/completions", headers=JSON, body=b'{"prompt": "x", "stream": true}')
    head, *body = asyncio.run(parts_of(app, call))
    assert head.status == 200 and len(body) > 3 and body[-1] == b"data: [DONE]\n\n"
    head, *body = asyncio.run(parts_of(app, HttpCall(method="GET", path="/nowhere")))
    assert head.status == 404 and b"no such path" in b"".join(body)
    engine.shutdown()


def test_who_stops_taking_pieces_is_a_client_that_went_away() -> None:
    fake = FakeEngine(step_seconds=0.001)
    app, engine = served_app(fake)
    body = b'{"prompt": "x", "max_tokens": 1000000, "stream": true}'

    async def take_three() -> None:
        pieces: Any = answer(app, HttpCall(method="POST", path="/v1/completions", headers=JSON, body=body))
        for _ in range(3):
            await anext(pieces)
        await pieces.aclose()

    asyncio.run(asyncio.wait_for(take_three(), 20))
    wait_until(lambda: bool(fake.aborted) and not fake.has_unfinished_requests())
    engine.shutdown()


def test_what_the_app_raises_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "http.request", "body": b"x", "more_body": False}
        message: Message = {"type": "http.response.start", "status": 200, "headers": []}
        await send(message)
        raise KeyError("out of luck")

    async def take_all(seen: list[Any]) -> None:
        async for part in answer(broken, HttpCall(method="POST", path="/", body=b"x")):
            seen.append(part)

    seen: list[Any] = []
    with pytest.raises(KeyError, match="out of luck"):
        asyncio.run(take_all(seen))
    assert seen == [Head(status=200, headers=[])]
