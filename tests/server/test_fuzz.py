"""Requests that nobody would write: the answer is a success or a 4xx in OpenAI's shape, and serving goes on."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.server import requests
from autodeploy.server.app import create_app
from autodeploy.server.served import ServedModel
from tests.server.running import EOS, MESSAGES, TOKENIZER, VOCAB, random_engine

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
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text, (shown, response.text)
    else:
        response.json()


@given(calls())
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_odd_fields(client: Any, call: tuple[str, dict[str, Any]]) -> None:
    path, body = call
    check(client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}), call)


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
