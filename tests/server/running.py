"""A server on a loopback port with a scripted engine behind it, and what its answers are checked with."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from autodeploy.runtime.async_engine import AsyncEngine
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
ANSWER = "hello wörld 😀 the end"
ANSWER_IDS = TOKENIZER.encode(ANSWER)
EOS: int = TOKENIZER.hf.eos_token_id
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    """A running server and the scripted engine behind it."""

    url: str
    fake: FakeEngine
    engine: AsyncEngine

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=20, **options)


Start = Callable[..., Server]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def assert_error(response: httpx.Response, status: int, message: str, param: str | None = None) -> None:
    """Every answer that is no success looks like this."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["param"] == param
