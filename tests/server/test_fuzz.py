"""Requests that nobody would write: the answer is a success or a 4xx in OpenAI's shape, and serving goes on."""

import json
import re
import socket
import threading
from typing import Any

import hypothesis.strategies as st
import psutil
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.server import requests
from autodeploy.server.app import create_app
from autodeploy.server.served import ServedModel
from tests.server.running import EOS, MESSAGES, TOKENIZER, VOCAB, Start, random_engine, wait_until

BODIES: dict[str, Any] = {
    "/v1/completions": requests.CompletionRequest,
    "/v1/chat/completions": requests.ChatCompletionRequest,
    "/tokenize": requests.TokenizeChatRequest,
    "/detokenize": requests.DetokenizeRequest,
}
USUAL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 3},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [70]},
}
texts = st.text(st.characters(exclude_categories=[]), max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2, 7, 0.5, 2**31, 2**63, 1e308])
leaves = st.none() | st.booleans() | numbers | texts | st.sampled_from(["auto", "text", "json_object", "hello", "70"])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
schemas = st.recursive(
    st.sampled_from(
        [{}, {"type": "string"}, {"type": "integer"}, {"enum": [1, "a"]}, {"$ref": "#"}, {"pattern": "a+"}]
    ),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(texts, inner, max_size=2)})
        | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)})
    ),
    max_leaves=4,
)
flags = st.sampled_from([True, False, None])
plausible: dict[str, Any] = {
    "guided_json": schemas,
    "guided_regex": st.text("ab()[]{}|*+?.\\^$0,", max_size=12),
    "guided_choice": st.lists(texts, max_size=3),
    "guided_grammar": st.text('start: "ab"|()\n', max_size=20),
    "logit_bias": st.dictionaries(st.sampled_from(["70", "0", "339", "340", "x"]), st.sampled_from([1, -100.0, 101])),
    "allowed_token_ids": st.lists(st.integers(0, 345), max_size=3),
    "bad_words": st.lists(texts, max_size=2),
    "stop": texts | st.lists(texts, max_size=2),
    "stop_token_ids": st.lists(st.integers(0, 345), max_size=2),
    "max_tokens": st.integers(0, 5),
    "n": st.integers(0, 3),
    "min_tokens": st.integers(0, 4),
    "logprobs": st.integers(-1, 21) | st.just(True),
    "prompt_logprobs": st.integers(0, 3),
    "top_k": st.sampled_from([-1, 0, 1, 400]),
    "seed": st.integers(-(2**63), 2**63),
    "truncate_prompt_tokens": st.integers(0, 9),
    "priority": st.integers(-3, 3),
    "prompt": texts | st.lists(st.integers(0, 345), max_size=4) | st.lists(texts, max_size=3),
    "tokens": st.lists(st.integers(-1, 345), max_size=5),
    **dict.fromkeys(("temperature", "top_p", "min_p"), st.floats(0, 1.1)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), st.floats(-2.2, 2.2)),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "add_special_tokens", "return_token_ids"), flags),
    **dict.fromkeys(("skip_special_tokens", "include_stop_str_in_output", "add_generation_prompt"), flags),
    **dict.fromkeys(("continue_final_message", "return_token_strs", "return_tokens_as_token_ids"), flags),
    **dict.fromkeys(("model", "reasoning_effort", "stream_options", "response_format", "tools"), st.none()),
    "user": values,
    "metadata": values,
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A usual request, some of whose fields have plausible values, and now and then one has any value."""
    path = draw(st.sampled_from(sorted(BODIES)))
    known = sorted(BODIES[path].model_fields)
    body = dict(USUAL[path])
    for name in draw(st.lists(st.sampled_from([name for name in known if name in plausible]), max_size=4)):
        body[name] = draw(plausible[name])
    if draw(st.sampled_from([False, False, True])):
        body[draw(st.sampled_from(known) | texts)] = draw(values)
    if body.get("max_tokens") is None and path.startswith("/v1"):
        body["max_tokens"] = 3
    return path, body


@pytest.fixture(scope="module")
def client() -> Any:
    engine = AsyncEngine(random_engine())
    grammars = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
    served = ServedModel(
        engine=engine, names=["tiny"], tokenizer=TOKENIZER, max_model_len=2048, constraints=Constraints(grammars)
    )
    with TestClient(create_app(served)) as opened:
        yield opened
        assert opened.get("/health").status_code == 200
        stats = engine.stats()
        assert stats.num_running == stats.num_waiting == 0, "nothing is left behind"
    engine.shutdown()


def check(response: Any, shown: object) -> None:
    assert response.status_code == 200 or 400 <= response.status_code < 500, (shown, response.text)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"server_error"' not in response.text, (
            shown,
            response.text,
        )
    else:
        response.json()


@given(calls())
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_odd_fields(client: Any, call: tuple[str, dict[str, Any]]) -> None:
    path, body = call
    check(client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}), call)


@pytest.mark.parametrize("stream", [False, True])
def test_constraints_that_contradict_each_other_are_the_requests_fault(client: Any, stream: bool) -> None:
    for fields in (
        {"guided_choice": ["0"]},
        {"guided_choice": ["00", "zero"], "allowed_token_ids": [TOKENIZER.encode("z")[0]]},
    ):
        body = {"prompt": "x", "max_tokens": 3, "allowed_token_ids": [0], "stream": stream, **fields}
        response = client.post("/v1/completions", json=body)
        assert "rules out every token" in response.text and "invalid_request_error" in response.text
        assert response.status_code == (200 if stream else 400)


@given(st.sampled_from(sorted(BODIES)), st.binary(max_size=40) | values.map(json.dumps).map(str.encode))
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_odd_bodies(client: Any, path: str, body: bytes) -> None:
    check(client.post(path, content=body, headers={"Content-Type": "application/json"}), body)


@pytest.mark.slow
@given(calls())
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
def test_many_odd_fields(client: Any, call: tuple[str, dict[str, Any]]) -> None:
    path, body = call
    check(client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}), call)


METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "post", "BREW", "P\x00ST", ""]
PATHS = [
    *sorted(BODIES),
    "/health",
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/",
    "/..",
    "//v1//",
    "/%00%ff",
    "*",
    "no",
]
HEADERS = [
    "Content-Type: application/json",
    "Content-Type: text/plain; charset=\x00",
    "Content-Type: multipart/form-data; boundary=",
    "Content-Encoding: gzip",
    "Accept: nothing/at-all",
    "Authorization: Bearer " + "k" * 3000,
    "X-Request-Id: a b\tc",
    "traceparent: 00-zz-zz-zz",
    "Expect: 100-continue",
    "Transfer-Encoding: chunked",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Host: a\r\nHost: b",
    "Upgrade: websocket\r\nConnection: upgrade",
    "no colon",
    ": no name",
    "X: " + "y" * 70_000,
]
odd_json = st.sampled_from(
    [
        b"[" * 5000,
        b'{"prompt": ' + b'{"a": ' * 3000 + b"1" + b"}" * 3001,
        b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": NaN, "top_p": -Infinity}',
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"prompt": "a", "prompt": ["b"], "max_tokens": 1}',
        b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}',
        '{"prompt": "x", "max_tokens": 1}'.encode("utf-16"),
        b'{"prompt": [' + b"1," * 3000 + b'1], "max_tokens": 1}',
        b'{"messages": [{"role": "user", "content": "' + "\u202e\u0000😀".encode() * 200 + b'"}], "max_tokens": 1}',
    ]
)


@st.composite
def raw_requests(draw: st.DrawFn) -> bytes:
    """Bytes that are nearly a request: each part is now and then one that nobody would send."""
    rarely = st.sampled_from([False, False, False, True])
    path = draw(st.sampled_from(PATHS if draw(rarely) else sorted(BODIES)))
    method = draw(st.sampled_from(METHODS)) if draw(rarely) else "POST"
    body = json.dumps(USUAL.get(path, {})).encode()
    if draw(st.booleans()):
        body = draw(odd_json | st.binary(max_size=60) | values.map(json.dumps).map(str.encode))
    if draw(rarely):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 3)) :]
    headers = draw(st.lists(st.sampled_from(HEADERS), max_size=3, unique=True)) if draw(rarely) else [HEADERS[0]]
    length = len(body) + (draw(st.sampled_from([-1, 1, 100])) if draw(rarely) else 0)
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, f"Content-Length: {max(0, length)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def answer_to(port: int, sent: bytes) -> bytes:
    """All that the server says before it closes the connection. Fails where it does not close."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:  # refused while it was being sent
            return b""


def test_odd_bytes_on_the_wire(start: Start, request: pytest.FixtureRequest) -> None:
    """As many as `--fuzz-requests` says: an answer below 500 or a closed connection, and nothing left behind."""
    server = start(random_engine())
    port = int(server.url.rpartition(":")[2])
    process = psutil.Process()

    @given(raw_requests())
    @settings(max_examples=request.config.getoption("--fuzz-requests"), suppress_health_check=list(HealthCheck))
    def send(sent: bytes) -> None:
        answer = answer_to(port, sent)
        statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+)", answer)]
        assert all(status < 500 for status in statuses), answer[:1000]

    server.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
    held, threads = process.num_fds(), threading.active_count()
    send()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
    wait_until(lambda: server.engine.stats().num_running == server.engine.stats().num_waiting == 0)
    assert server.engine.stats().state_usage_fraction == 0
    wait_until(lambda: process.num_fds() <= held + 2)
    assert threading.active_count() <= threads + 40, "the loop's pool is bounded"
