"""The server on a loopback port, judged by the official `openai` client and by raw HTTP."""

import asyncio
import http.client
import json
import time
from typing import Any

import httpx
import openai
import pytest

from autodeploy.runtime.request import SamplingParams
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.tiny_tokenizers import byte_level
from tests.server.running import ANSWER, ANSWER_IDS, EOS, MESSAGES, TOKENIZER, Start, assert_error, wait_until


def test_openai_client_completions(start: Start) -> None:
    client = start().client()
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=100)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode("hello"))
    assert answer.usage.completion_tokens == len(ANSWER_IDS) + 1
    short = client.completions.create(model="alias", prompt=[5, 6, 7], extra_body={"ignore_eos": True})
    assert short.usage is not None and short.usage.completion_tokens == 16
    assert short.choices[0].finish_reason == "length" and short.model == "alias"


def test_openai_client_completions_of_several_prompts(start: Start) -> None:
    client = start(FakeEngine()).client()  # answers repeat the prompt
    letters = ["a", "b", "c"]
    answer = client.completions.create(model="tiny", prompt=letters, max_tokens=2, n=2)
    assert [choice.text for choice in answer.choices] == ["aa", "aa", "bb", "bb", "cc", "cc"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    ids = [TOKENIZER.encode(letter) for letter in letters]
    streamed = ["", "", ""]
    for chunk in client.completions.create(model="tiny", prompt=ids, max_tokens=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == ["aa", "bb", "cc"]


def test_openai_client_chat(start: Start) -> None:
    client = start().client()
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=100)
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(TOKENIZER.apply_chat_template(MESSAGES))
    # What came back can be sent again, and parts are read as text.
    again: Any = [
        *MESSAGES,
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=again)
    assert answer.choices[0].message.content == ANSWER  # without a limit the answer is not cut


def test_openai_client_chat_stream_with_usage(start: Start) -> None:
    client = start().client()
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [ANSWER, ANSWER] and reasons == ["stop", "stop"]
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None
    assert usage.completion_tokens == 2 * (len(ANSWER_IDS) + 1)
    assert all("\ufffd" not in (chunk.choices[0].delta.content or "") for chunk in chunks[:-1])


def test_openai_async_client_many_streams(start: Start) -> None:
    server = start(FakeEngine())

    async def one(client: openai.AsyncOpenAI, letter: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=letter, max_tokens=10, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=20) as client:
            whole = client.completions.create(model="tiny", prompt="z", max_tokens=3)
            texts = await asyncio.gather(*(one(client, letter) for letter in "abcdefgh"))
            return [*texts, (await whole).choices[0].text]

    assert asyncio.run(everything()) == [letter * 10 for letter in "abcdefgh"] + ["zzz"]


def test_stop_strings_and_logprobs(start: Start) -> None:
    client = start().client()
    stopped = client.completions.create(model="tiny", prompt="x", max_tokens=100, stop=["😀 th"], logprobs=2)
    choice = stopped.choices[0]
    assert (choice.text, choice.finish_reason) == ("hello wörld ", "stop")
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.top_logprobs is not None and len(choice.logprobs.top_logprobs[0]) == 3
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1, max_tokens=2)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    first = chat.choices[0].logprobs.content[0]
    assert first.token.encode() == bytes(first.bytes or []) and len(first.top_logprobs) == 1
    streamed = list(client.completions.create(model="tiny", prompt="x", max_tokens=4, logprobs=0, stream=True))
    offsets = [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset or []]  # type: ignore[union-attr]
    assert len(offsets) == 4 and offsets == sorted(offsets) and offsets[0] == 0


def test_the_models_sampling_defaults_apply_unless_given(start: Start) -> None:
    seen = []
    fake = FakeEngine(ANSWER_IDS, eos_id=EOS)
    add = fake.add_request
    fake.add_request = lambda *args, **kwargs: (seen.append(args[2]), add(*args, **kwargs))[1]  # type: ignore[method-assign]
    client = start(fake, default_sampling={"temperature": 0.25, "top_k": 9}).client()
    client.completions.create(model="tiny", prompt="x")
    client.completions.create(model="tiny", prompt="x", temperature=0.5, extra_body={"min_p": 0.1})
    assert [(params.temperature, params.top_k, params.min_p) for params in seen] == [(0.25, 9, 0.0), (0.5, 9, 0.1)]


BAD_BODIES: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("completions", {}, "prompt", "prompt"),
    ("completions", {"prompt": ""}, "empty", "prompt"),
    ("completions", {"prompt": []}, "empty", "prompt"),
    ("completions", {"prompt": [[]]}, "empty", "prompt"),
    ("completions", {"prompt": [5000]}, "vocabulary", "prompt"),
    ("completions", {"prompt": "x" * 9000}, "too long", "prompt"),
    ("completions", {"prompt": 3}, "prompt", "prompt"),
    ("completions", {"prompt": ["a"] * 100, "n": 2}, "more than 128", "prompt"),
    ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens"),
    ("completions", {"prompt": "x", "max_tokens": 1.5}, "max_tokens", "max_tokens"),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature", "temperature"),
    ("completions", {"prompt": "x", "temperature": "1"}, "temperature", "temperature"),
    ("completions", {"prompt": "x", "n": 100_000}, "n is", "n"),
    ("completions", {"prompt": "x", "stop": [""]}, "stop", "stop"),
    ("completions", {"prompt": "x", "best_of": 4}, "not supported", "best_of"),
    ("completions", {"prompt": "x", "temprature": 1}, "did you mean 'temperature'", "temprature"),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "stream=true", "stream_options"),
    ("completions", {"prompt": "x", "stream": True, "stream_options": {"chunk": 1}}, "unknown field", "chunk"),
    ("chat/completions", {"messages": []}, "messages", "messages"),
    ("chat/completions", {"messages": [{"role": "root", "content": "x"}]}, "messages", "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a\ud800"}]}, "surrogate", None),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "part of type 'image_url' is not supported",
        "messages",
    ),
    ("chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "function", "tools"),
    ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "json"}}, "type", "response_format"),
    ("chat/completions", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "not supported", "chat_template"),
    ("chat/completions", {"messages": MESSAGES, "top_logprobs": 3}, "logprobs=true", "top_logprobs"),
    ("chat/completions", {"messages": MESSAGES, "a\ud800": 3}, "unknown field", "a\ud800"),
]


def test_bad_requests_are_refused_by_name(start: Start) -> None:
    server = start()
    for path, body, message, param in BAD_BODIES:
        response = httpx.post(
            f"{server.url}/v1/{path}",
            content=json.dumps(body),
            timeout=20,
            headers={"Content-Type": "application/json"},
        )
        try:
            assert_error(response, 400, message, param)
        except AssertionError as error:
            raise AssertionError(f"{path} {body}: {response.text}") from error
    assert server.fake.added == []
    assert server.client().completions.create(model="tiny", prompt="x").choices  # and it still works


def test_harmless_and_empty_fields_are_accepted(start: Start) -> None:
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "user": "u",
        "metadata": {"a": "b"},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": None,
        "store": False,
        "parallel_tool_calls": True,
    }
    assert start().post("/v1/chat/completions", body).status_code == 200


RAW = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v1/completions", b'{"prompt": "x"', 400, "not valid JSON"),
        ("POST", "/v1/completions", b"\xff\xfe", 400, "body"),
        ("POST", "/v1/completions", b"[1, 2]", 400, "the body"),
        ("POST", "/v1/completions", b"", 400, "the body"),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "body"),
        ("POST", "/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
        ("POST", "/v1/completions", b'{"prompt": "x", "seed": 1e999}', 400, "seed"),
        ("POST", "/v1/completions", b'{"prompt": "x", "model": "other"}', 404, "'other' does not exist"),
        ("POST", "/v1/completions", b"null", 400, "must be a JSON object"),
        ("POST", "/tokenize", b"[]", 400, "must be a JSON object"),
        ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
        ("POST", "/v1/completions/", b'{"prompt": "x"}', 404, "no such path: POST /v1/completions/"),
        ("GET", "/nowhere", b"", 404, "no such path: GET /nowhere"),
        ("POST", "/v1/completions", b'{"prompt": "' + b"x" * 3000 + b'"}', 413, "larger than 2000 bytes"),
    ],
)
def test_every_error_has_the_same_shape(
    start: Start, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    limit = 2000 if status == 413 else 2**20
    url = start(max_body_bytes=limit).url + path
    response = httpx.request(method, url, content=content, headers=RAW, timeout=20)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"], response.text
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("media_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_bodies_of_other_types_are_refused_with_the_one_that_is_read(start: Start, path: str, media_type: str) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = httpx.post(start().url + path, content=b'{"prompt": "x"}', headers=headers)
    assert_error(response, 415, f"'Content-Type: application/json'; found {media_type!r}")


def test_a_body_without_a_length_is_limited_too(start: Start) -> None:
    server = start(max_body_bytes=2000)
    chunks = (b'{"prompt": "', *(b"x" * 500 for _ in range(10)), b'"}')
    response = httpx.post(f"{server.url}/v1/completions", content=iter(chunks), headers=RAW, timeout=20)
    assert_error(response, 413, "larger than 2000 bytes")


def test_openai_client_raises_its_own_errors(start: Start) -> None:
    client = start().client()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="not supported") as caught:
        client.completions.create(model="tiny", prompt="x", suffix="y")
    assert caught.value.param == "suffix"


def test_without_a_tokenizer_only_token_ids(start: Start) -> None:
    server = start(tokenizer=None)
    answer = server.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 2, "logprobs": 0}).json()
    assert answer["choices"][0]["text"] == "" and answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in ANSWER_IDS[:2]]
    assert_error(server.post("/v1/completions", {"prompt": "x"}), 400, "no tokenizer", "prompt")
    assert_error(server.post("/v1/chat/completions", {"messages": MESSAGES}), 400, "no tokenizer", "messages")


def test_without_a_chat_template(start: Start) -> None:
    server = start(tokenizer=byte_level(chat_template=None))
    assert_error(server.post("/v1/chat/completions", {"messages": MESSAGES}), 400, "no chat template", "messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_client_that_goes_away_aborts_its_request(start: Start, stream: bool, held: bool) -> None:
    """Also while the model has not said a word yet (`held`)."""
    server = start(FakeEngine(step_seconds=0.002))
    if held:
        server.fake.hold.set()
    body = json.dumps({"prompt": "a", "max_tokens": 1_000_000, "stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)
    connection.request("POST", "/v1/completions", body, RAW)
    if stream and not held:
        assert connection.getresponse().read(20).startswith(b"data: {")
    wait_until(lambda: bool(server.fake.added))
    assert connection.sock is not None or stream
    time.sleep(0.1)
    connection.close()
    if held:
        time.sleep(0.1)
        server.fake.hold.clear()
    wait_until(lambda: bool(server.fake.aborted) and not server.fake.has_unfinished_requests())


def test_a_full_queue_is_429(start: Start) -> None:
    response = start(FakeEngine(max_queued=0)).post("/v1/completions", {"prompt": [1]})
    assert_error(response, 429, "queue is full")
    assert response.headers["retry-after"] == "1"


def test_a_dead_engine_is_503_everywhere(start: Start) -> None:
    server = start(FakeEngine(crash_at_step=3))
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert_error(server.post("/v1/completions", {"prompt": [1]}), 503, "engine has stopped")
    again = server.post("/v1/completions", {"prompt": [1]})
    assert_error(again, 503, "engine has stopped")
    assert again.headers["retry-after"] == "10"
    assert_error(httpx.get(f"{server.url}/health"), 503, "stopped")


def test_a_crash_in_mid_stream_is_an_error_event(start: Start) -> None:
    client = start(FakeEngine(crash_at_step=5)).client()
    stream = client.completions.create(model="tiny", prompt=[1], max_tokens=100, stream=True)
    with pytest.raises(openai.APIError, match="the engine has stopped"):
        for _ in stream:
            pass


def test_a_hanging_engine_is_not_healthy(start: Start) -> None:
    server = start(FakeEngine(), step_timeout_seconds=0.05)
    server.fake.hold.set()
    server.engine.submit("r", [1], SamplingParams(max_tokens=None), lambda delivery: None)
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)


def test_version_metrics_and_schema(start: Start) -> None:
    server = start()
    assert httpx.get(f"{server.url}/version").json() == {"version": "1.2.3"}
    server.post("/v1/completions", {"prompt": [1], "max_tokens": 4})
    text = httpx.get(f"{server.url}/metrics").text
    for line in (
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'vllm:kv_cache_usage_perc{model_name="tiny"} 0.25',
        'vllm:prompt_tokens_total{model_name="tiny"} 7.0',
        'vllm:generation_tokens_total{model_name="tiny"} 4.0',
    ):
        assert line in text
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(schema["paths"])
