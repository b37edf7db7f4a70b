"""Every field of OpenAI's and vLLM's requests does what it says, or is refused by name."""

from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.request import REAL_RANGES, WHOLE_RANGES
from autodeploy.server import answers, requests
from autodeploy.server.fields import UNSUPPORTED_FIELDS
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.tiny_tokenizers import byte_level
from tests.server.running import ANSWER, ANSWER_IDS, EOS, MESSAGES, TOKENIZER, Server, Start, assert_error


def seen_params(server: Server) -> list[Any]:
    """What reaches the engine from now on."""
    seen: list[Any] = []
    add = server.fake.add_request
    server.fake.add_request = lambda *args, **kwargs: (seen.append(args[2]), add(*args, **kwargs))[1]  # type: ignore[method-assign]
    return seen


def test_sampling_fields_reach_the_engine(start: Start) -> None:
    server = start()
    seen = seen_params(server)
    own = {"n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "min_tokens": 1}
    penalties = {"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    ends = {"stop_token_ids": [5], "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False}
    body = {"prompt": "x", "stop": "y", "logit_bias": {"5": 1.5}, "allowed_token_ids": [5, 6], "bad_words": ["wörld"]}
    assert server.post("/v1/completions", body | own | penalties | ends).status_code == 200
    (params,) = seen
    for name, value in (own | penalties).items():
        assert getattr(params, name) == value
    assert params.stop == ("y",) and params.stop_token_ids == (5,) and params.ignore_eos
    assert params.include_stop_str_in_output and not params.skip_special_tokens
    assert params.logit_bias == {5: 1.5} and params.allowed_token_ids == (5, 6)
    assert {TOKENIZER.decode(bad) for bad in params.bad_token_sequences} == {"wörld", " wörld"}


def test_echo_repeats_the_prompt_with_its_logprobs(start: Start) -> None:
    server = start()
    prompt = TOKENIZER.encode("hello a line")
    body: dict[str, Any] = {"prompt": "hello a line", "echo": True, "logprobs": 1, "max_tokens": 3}
    whole = server.post("/v1/completions", body).json()["choices"][0]
    assert whole["text"] == "hello a line" + TOKENIZER.decode(ANSWER_IDS[:3])
    logprobs = whole["logprobs"]
    assert logprobs["token_logprobs"][: len(prompt)] == [None, *(-1.0 - at for at in range(len(prompt) - 1))]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["tokens"]) == len(prompt) + 3
    assert "".join(logprobs["tokens"][: len(prompt)]) == "hello a line"
    streamed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    text = ""
    client = server.client()
    for chunk in client.completions.create(model="tiny", stream=True, **body):
        text += chunk.choices[0].text
        for name, values in streamed.items():
            values += getattr(chunk.choices[0].logprobs, name)
    assert text == whole["text"]
    assert streamed == {name: logprobs[name] for name in streamed}
    scored = server.post("/v1/completions", {**body, "max_tokens": 0}).json()
    assert scored["choices"][0]["text"] == "hello a line" and len(scored["choices"][0]["logprobs"]["tokens"]) == len(
        prompt
    )
    assert scored["usage"]["completion_tokens"] == 0
    ids = server.post("/v1/completions", {"prompt": prompt, "echo": True, "max_tokens": 1}).json()
    assert ids["choices"][0]["text"].startswith("hello a line")


def test_prompt_logprobs_and_token_ids(start: Start) -> None:
    server = start()
    prompt = TOKENIZER.encode("hello a line")
    extra = {"prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 2}
    choice = server.post("/v1/completions", {"prompt": "hello a line", **extra}).json()["choices"][0]
    assert choice["prompt_token_ids"] == prompt and choice["token_ids"] == ANSWER_IDS[:2]
    assert choice["prompt_logprobs"][0] is None
    entry = choice["prompt_logprobs"][1][str(prompt[1])]
    assert entry == {"logprob": -1.0, "rank": 1, "decoded_token": TOKENIZER.decode([prompt[1]])}
    chat = server.post("/v1/chat/completions", {"messages": MESSAGES, **extra}).json()
    assert chat["prompt_token_ids"] == TOKENIZER.apply_chat_template(MESSAGES)
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])
    assert chat["choices"][0]["token_ids"] == ANSWER_IDS[:2]
    plain = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()
    assert "prompt_logprobs" not in plain and "token_ids" not in plain["choices"][0]
    named = server.post(
        "/v1/completions", {"prompt": "x", "logprobs": 0, "return_tokens_as_token_ids": True, "max_tokens": 1}
    )
    assert named.json()["choices"][0]["logprobs"]["tokens"] == [f"token_id:{ANSWER_IDS[0]}"]


def test_usage_in_every_chunk_and_the_requests_own_id(start: Start) -> None:
    client = start().client()
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="a",
            max_tokens=3,
            stream=True,
            stream_options=options,
            extra_body={"request_id": "r-1"},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert counts == [1, 2, 3, 3] and {chunk.id for chunk in chunks} == {"cmpl-r-1"}


def test_bytes_of_tokens_join_to_the_text(start: Start) -> None:
    """A character may be several tokens, none of which is text by itself."""
    server = start(FakeEngine(TOKENIZER.encode("a 漢字 b"), eos_id=EOS))
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries if entry["token"] != "<|im_end|>")
    assert spelled.decode() == "a 漢字 b" and any("\ufffd" in entry["token"] for entry in entries)
    assert entries[0]["top_logprobs"][0]["bytes"] == entries[0]["bytes"]


def test_prompts_are_cut_on_request(start: Start) -> None:
    server = start()
    cut = server.post(
        "/v1/completions", {"prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2, "return_token_ids": True}
    )
    assert cut.json()["choices"][0]["prompt_token_ids"] == [7, 8]
    chat = server.post("/v1/chat/completions", {"messages": MESSAGES, "truncate_prompt_tokens": 3})
    assert chat.json()["usage"]["prompt_tokens"] == 3


def test_tokenize_and_detokenize(start: Start) -> None:
    server = start()
    ids = TOKENIZER.encode("héllo")
    answer = server.post("/tokenize", {"model": "tiny", "prompt": "héllo", "return_token_strs": True}).json()
    assert answer == {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": TOKENIZER.pieces(ids)}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == TOKENIZER.apply_chat_template(MESSAGES) and "token_strs" not in chat
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "héllo"}
    assert_error(server.post("/detokenize", {"tokens": [10**9]}), 400, "not a token", "tokens")
    assert_error(server.post("/detokenize", {"tokens": [-1]}), 400, "not a token", "tokens")
    assert_error(server.post("/tokenize", {"prompt": 3}), 400, "prompt: Input should be a valid string", "prompt")
    assert_error(server.post("/tokenize", {"messages": 3}), 400, "messages: Input should be a valid list", "messages")
    assert_error(server.post("/tokenize", {"model": "other", "prompt": "x"}), 404, "does not exist")
    assert_error(start(tokenizer=None).post("/tokenize", {"prompt": "x"}), 400, "no tokenizer", "prompt")


def test_ping_and_one_model(start: Start) -> None:
    server = start()
    assert httpx.get(f"{server.url}/ping").status_code == server.post("/ping").status_code == 200
    assert server.client().models.retrieve("alias").id == "alias"
    assert_error(httpx.get(f"{server.url}/v1/models/other"), 404, "does not exist")


def test_template_variables_of_a_request(start: Start) -> None:
    template = "{{ messages[0].content }}{% if shout %}!!{% endif %}{{ reasoning_effort }}"
    server = start(tokenizer=byte_level(chat_template=template))
    shouted = {"messages": MESSAGES, "chat_template_kwargs": {"shout": True}, "reasoning_effort": "low"}
    tokens = server.post("/tokenize", shouted).json()["tokens"]
    assert TOKENIZER.decode(tokens) == "hello!!low"
    for name in ("quiet", "messages", "tokenize", "chat_template", "raise_exception", "eos_token", "if "):
        body = {"messages": MESSAGES, "chat_template_kwargs": {name: True}}
        assert_error(server.post("/v1/chat/completions", body), 400, "takes no variable", "chat_template_kwargs")
    deep = {"messages": MESSAGES, "chat_template_kwargs": {"shout": [[]]}}
    assert_error(server.post("/v1/chat/completions", deep), 400, "must be", "chat_template_kwargs")
    unread = {"messages": MESSAGES, "reasoning_effort": "low"}
    assert_error(start().post("/v1/chat/completions", unread), 400, "takes no variable", "reasoning_effort")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"5": 1000}}, "logit_bias"),
    ("completions", {"allowed_token_ids": []}, "allowed_token_ids"),
    ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ("completions", {"prompt_logprobs": -1}, "prompt_logprobs"),
    ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("completions", {"request_id": "a\nb"}, "request_id"),
    ("completions", {"suffix": "x"}, "suffix"),
    ("completions", {"use_beam_search": True}, "use_beam_search"),
    ("chat/completions", {"echo": True}, "echo"),
    ("chat/completions", {"modalities": ["audio"]}, "modalities"),
    ("chat/completions", {"n": True}, "n"),
    ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat/completions", {"thinking_token_budget": 5}, "thinking_token_budget"),
]


def test_nulls_are_fields_left_out(start: Start) -> None:
    server = start()
    for path, model, needed in (
        ("completions", requests.CompletionRequest, {"prompt": "x"}),
        ("chat/completions", requests.ChatCompletionRequest, {"messages": MESSAGES}),
    ):
        nulls = dict.fromkeys((*model.model_fields, *UNSUPPORTED_FIELDS))
        assert server.post(f"/v1/{path}", nulls | needed).status_code == 200
        assert_error(server.post(f"/v1/{path}", nulls), 400, "", next(iter(needed)))


def test_what_is_not_done_is_refused_by_name(start: Start) -> None:
    server = start()
    for path, fields, param in REFUSED:
        base = {"prompt": "x"} if path == "completions" else {"messages": MESSAGES}
        assert_error(server.post(f"/v1/{path}", base | fields), 400, "", param)
    assert server.fake.added == []


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(start: Start) -> None:
    server = start(FakeEngine(ANSWER_IDS, eos_id=EOS, max_model_len=8))
    for path, body in (
        ("/v1/completions", {"prompt": "x" * 1000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1000}]}),
        ("/tokenize", {"prompt": "x" * 1000}),
    ):
        assert_error(server.post(path, body), 400, "tokens can hold", "prompt" if "prompt" in body else "messages")


def _without_null_defaults(schema: Any) -> Any:
    """FastAPI leaves these out."""
    if isinstance(schema, list):
        return [_without_null_defaults(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name != "default" or value is not None}
    return {name: _without_null_defaults(value) for name, value in kept.items()}


def test_the_openapi_document_is_true(start: Start) -> None:
    server = start()
    document = httpx.get(f"{server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    bodies = {
        "/v1/completions": (requests.CompletionRequest, answers.CompletionResponse),
        "/v1/chat/completions": (requests.ChatCompletionRequest, answers.ChatCompletionResponse),
        "/detokenize": (requests.DetokenizeRequest, answers.DetokenizeResponse),
    }
    for path, (taken, given) in bodies.items():
        operation = document["paths"][path]["post"]
        for model, place in (
            (taken, operation["requestBody"]["content"]),
            (given, operation["responses"]["200"]["content"]),
        ):
            schema = schemas[place["application/json"]["schema"]["$ref"].rpartition("/")[2]]
            mode: Any = "validation" if model is taken else "serialization"
            expected = TypeAdapter(model).json_schema(mode=mode, ref_template="#/components/schemas/{model}")
            expected.pop("$defs", None)
            assert schema == _without_null_defaults(expected), path
        for status in ("400", "404", "405", "413", "422", "429", "500", "503"):
            error = operation["responses"][status]["content"]["application/json"]["schema"]
            assert error["$ref"].endswith("/ErrorResponse")
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}).json()
    properties = schemas["ChatCompletionResponse"]["properties"]
    assert set(answer) <= set(properties) and answer["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("name", [name for name in REAL_RANGES | WHOLE_RANGES if name in requests.SAMPLING_FIELDS])
def test_the_openapi_document_tells_the_ranges_of_numbers(name: str) -> None:
    told = requests.CompletionRequest.model_json_schema()["properties"][name]["anyOf"][0]
    if told.get("format") == "int64":
        told |= {"minimum": -(2**63), "maximum": 2**63 - 1}
    step = 1 if told["type"] == "integer" else 1e-4

    def is_taken(value: float) -> bool:
        body = requests.CompletionRequest(prompt="hello", max_tokens=1000, **{name: value})
        try:
            body.sampling_params({})
        except InvalidRequestError as error:
            assert error.parameter == name
            return False
        return True

    least, above = told.get("minimum"), told.get("exclusiveMinimum")
    inside, outside = (least, least - step) if least is not None else (above + step, above)
    assert is_taken(inside) and not is_taken(outside)
    if "maximum" in told:
        assert is_taken(told["maximum"]) and not is_taken(told["maximum"] + step)


ROUTES = ("/health", "/ping", "/ready", "/version", "/metrics", "/status", "/status.json", "/v1/models")


def test_the_openapi_document_has_every_route_and_its_type(start: Start) -> None:
    server = start()
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {*ROUTES, "/tokenize", "/detokenize", "/v1/models/{name}"} <= set(paths)
    for path in ROUTES:
        response = httpx.get(server.url + path)
        told = paths[path]["get"]["responses"]["200"].get("content", {})
        given = response.headers.get("content-type", "").partition(";")[0]
        assert list(paths[path]["get"]["responses"]["503"]["content"]) == ["application/json"]
        assert response.status_code == 200 and list(told) == ([given] if given else []), path
