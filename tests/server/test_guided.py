"""Structured output and tools over HTTP: the real engine around random logits, the official client in front of it."""

import asyncio
import json
import re
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.structured_outputs import StructuredOutputsParams
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.tiny_tokenizers import CHAT_TEMPLATE, byte_level
from tests.server.running import EOS, MESSAGES, TOKENIZER, Start, assert_error, random_engine

COLOUR: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}
POINT: dict[str, Any] = {
    "$defs": {"number": {"type": "integer", "minimum": 0, "maximum": 9}},
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/number"}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "paint", "description": "d", "parameters": COLOUR}},
    {"type": "function", "function": {"name": "move", "parameters": POINT}},
]
TEMPLATE = CHAT_TEMPLATE + "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{# </think> #}"
JSON_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR, "strict": True}}


def check_colour(value: Any) -> None:
    assert set(value) == {"colour", "n"} and value["colour"] in ("red", "blue") and 0 <= value["n"] <= 99


def test_the_official_client_gets_what_it_asks_for(start: Start) -> None:
    client = start(random_engine()).client()
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=JSON_SCHEMA, n=3)
    for choice in answer.choices:
        check_colour(json.loads(choice.message.content or ""))
        assert choice.finish_reason == "stop"
    streamed = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=JSON_SCHEMA, stream=True)
    check_colour(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in streamed)))
    text = client.completions.create(
        model="tiny", prompt="x", max_tokens=900, extra_body={"response_format": JSON_SCHEMA}
    )
    check_colour(json.loads(text.choices[0].text))


class Colour(BaseModel):
    """What the client's own parser makes of an answer."""

    name: Literal["red", "blue"]
    share: int


def test_the_official_clients_parser(start: Start) -> None:
    tokenizer = byte_level(chat_template=TEMPLATE)
    client = start(random_engine(tokenizer), tokenizer=tokenizer).client()
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Colour, max_tokens=900)
    assert isinstance(parsed.choices[0].message.parsed, Colour)
    called = client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Colour)],
        tool_choice={"type": "function", "function": {"name": "Colour"}},
        max_tokens=900,
    )
    (call,) = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Colour)


def test_the_official_clients_streaming_parser(start: Start) -> None:
    """It puts chunks together itself, parses as it goes, and refuses what does not fit together."""
    tokenizer = byte_level(chat_template=TEMPLATE)
    server = start(random_engine(tokenizer), tokenizer=tokenizer)
    common: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 900}
    with server.client().chat.completions.stream(response_format=Colour, **common) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") > 1 and kinds[-1] == "content.done"
    assert isinstance(final.choices[0].message.parsed, Colour)

    async def tools() -> Any:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)
        tool = openai.pydantic_function_tool(Colour)
        async with (
            client,
            client.chat.completions.stream(
                tools=[tool], tool_choice="required", parallel_tool_calls=False, **common
            ) as stream,
        ):
            kinds = [event.type async for event in stream]
            assert "tool_calls.function.arguments.delta" in kinds
            assert kinds.count("tool_calls.function.arguments.done") == 1
            return await stream.get_final_completion()

    (call,) = asyncio.run(tools()).choices[0].message.tool_calls
    assert call.function.name == "Colour" and isinstance(call.function.parsed_arguments, Colour)


def test_the_official_async_client_parses_too(start: Start) -> None:
    server = start(random_engine())

    async def everything() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=20) as client:
            model = await client.models.retrieve("tiny")
            ask = client.chat.completions.parse
            asked = (ask(model=model.id, messages=MESSAGES, response_format=Colour, max_tokens=900) for _ in range(4))
            return await asyncio.gather(*asked)

    for answer in asyncio.run(everything()):
        assert isinstance(answer.choices[0].message.parsed, Colour)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "a" "b"'}, "ab"),
        ({"guided_json": {"const": 12}}, "12"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": '{"const": 12}'}}, "12"),
        ({"structured_outputs": {"grammar": 'root ::= "ab"'}}, "ab"),
    ],
)
def test_vllms_fields(start: Start, fields: dict[str, Any], pattern: str) -> None:
    server = start(random_engine())
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": MESSAGES})):
        choice = server.post(f"/v1/{path}", body | fields).json()["choices"][0]
        text = choice["text"] if path == "completions" else choice["message"]["content"]
        assert re.fullmatch(pattern, text), text


def test_guided_and_free_requests_share_batches(start: Start) -> None:
    """Each guided one follows its own grammar; a greedy free one has the tokens it has alone."""
    server = start(random_engine())
    free = {"prompt": "hello", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    alone = server.post("/v1/completions", free).json()["choices"][0]["token_ids"]

    async def everything() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [
                {"prompt": "a", "guided_regex": f"[0-9]{{{length}}}", "max_tokens": 60} for length in range(5, 13)
            ]
            return list(await asyncio.gather(*(client.post("/v1/completions", json=body) for body in [free, *bodies])))

    first, *guided = [response.json()["choices"][0] for response in asyncio.run(everything())]
    assert first["token_ids"] == alone
    for length, choice in zip(range(5, 13), guided, strict=True):
        assert re.fullmatch(f"[0-9]{{{length}}}", choice["text"])


def test_a_grammar_that_grows_beyond_the_limits_is_the_requests_fault(start: Start) -> None:
    """It compiles within them, and exceeds them some tokens later."""
    server = start(random_engine())
    rules = "".join(f'r{at}: "b"? (r{at + 1} "c"*)+ | "d"\n' for at in range(400))
    grammar = f'start: r0\n{rules}r400: "a"'
    begins = TOKENIZER.encode("b")[0]
    body = {"prompt": "x", "max_tokens": 9, "guided_grammar": grammar, "logit_bias": {begins: 100}}
    assert_error(server.post("/v1/completions", body), 400, "too complex")
    streamed = server.post("/v1/completions", {**body, "stream": True})
    *_, error, last = [line for line in streamed.text.splitlines() if line]
    assert "too complex" in error and "invalid_request_error" in error and last == "data: [DONE]"


def test_guidance_drafts_streams_and_batches_at_once(start: Start) -> None:
    """Every kind of guidance, in streams side by side, in chunks, with drafts: each as alone and without drafts."""
    tokenizer = byte_level(chat_template=TEMPLATE)
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "page_size": 8}
    repeated = {"prompt": "ab" * 40, "temperature": 0, "max_tokens": 120}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("completions", {**repeated, "guided_json": COLOUR}),
        ("completions", {**repeated, "guided_regex": "(ab){40,50}"}),
        ("completions", {**repeated, "guided_choice": ["abab" * 12, "abba" * 12]}),
        ("completions", {**repeated, "guided_grammar": 'root ::= "ab" root | "ab."'}),
        ("completions", {**repeated, "ignore_eos": True}),
    ]
    named = {"type": "function", "function": {"name": "paint"}}
    for choice in ("required", named):
        tools = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
        asked.append(("chat/completions", {**tools, "temperature": 0, "max_tokens": 900}))
    plain = start(random_engine(tokenizer, **options), tokenizer=tokenizer)
    expected = [said(plain.post(f"/v1/{path}", body).json()["choices"][0]) for path, body in asked]
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    server = start(random_engine(tokenizer, speculative_config=drafts, **options), tokenizer=tokenizer)

    async def everything() -> list[str]:
        async with httpx.AsyncClient(base_url=f"{server.url}/v1/", timeout=60) as client:
            answers = await asyncio.gather(*(client.post(path, json={**body, "stream": True}) for path, body in asked))
        return [answer.text for answer in answers]

    for text, alone in zip(asyncio.run(everything()), expected, strict=True):
        *lines, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert last == "[DONE]" and len(lines) > 1
        assert "".join(said(json.loads(line)["choices"][0]) for line in lines) == alone
    assert server.engine.stats().accepted_tokens > 0


def said(choice: dict[str, Any]) -> str:
    """Text or arguments of calls, of a whole choice or of a piece of one."""
    message = choice.get("message") or choice.get("delta") or {}
    calls = "".join(call["function"].get("arguments") or "" for call in message.get("tool_calls") or ())
    return str(choice.get("text") or message.get("content") or "") + calls


def test_guided_requests_keep_their_place_when_memory_is_short() -> None:
    """In chunks, preempted and computed anew: each output is the one that its request has alone."""

    def run(engine: Engine, numbers: range) -> dict[str, list[int]]:
        outputs: dict[str, list[int]] = {}
        for number in numbers:
            params = SamplingParams(
                temperature=0,
                max_tokens=60,
                structured_outputs=StructuredOutputsParams(regex=f"[0-9]{{{20 + number}}}"),
            )
            engine.add_request(str(number), [70 + number] * 40, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                outputs.setdefault(output.request_id, []).extend(output.token_ids)
        return outputs

    short = random_engine(max_num_batched_tokens=16, page_size=4, kv_cache_memory_bytes=4 * 4 * 45, max_model_len=120)
    together = run(short, range(6))
    assert short.stats().num_preemptions, "the memory was meant to be short"
    for number in range(6):
        alone = run(random_engine(), range(number, number + 1))
        assert together[str(number)] == alone[str(number)]
        assert re.fullmatch(f"[0-9]{{{20 + number}}}", TOKENIZER.decode(together[str(number)]))


def test_tools_that_must_be_called(start: Start) -> None:
    tokenizer = byte_level(chat_template=TEMPLATE)
    client = start(random_engine(tokenizer), tokenizer=tokenizer).client()
    named: Any = {"type": "function", "function": {"name": "paint"}}
    common: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 900}
    answer = client.chat.completions.create(tool_choice=named, **common)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "paint" and call.id
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    check_colour(json.loads(call.function.arguments))
    required = client.chat.completions.create(tool_choice="required", parallel_tool_calls=False, **common)
    (call,) = required.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name in ("paint", "move")
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == ({"x"} if call.function.name == "move" else {"colour", "n"})
    pieces = ""
    for chunk in client.chat.completions.create(
        tool_choice="required", parallel_tool_calls=False, stream=True, **common
    ):
        for part in chunk.choices[0].delta.tool_calls or []:
            pieces += (part.function.arguments or "") if part.function else ""
        reason = chunk.choices[0].finish_reason
    assert isinstance(json.loads(pieces), dict) and reason == "tool_calls"


def test_tools_that_may_be_called(start: Start) -> None:
    """What the model writes by itself: a thought, a text and two calls."""
    written = (
        "<think>which?</think>\n\nhello\n"
        '<tool_call>{"name": "paint", "arguments": {"colour": "red", "n": 1}}</tool_call>\n'
        '<tool_call>{"name": "move", "arguments": {"x": 2}}</tool_call>'
    )
    tokenizer = byte_level(chat_template=TEMPLATE)
    server = start(FakeEngine(tokenizer.encode(written), eos_id=EOS), tokenizer=tokenizer)
    client = server.client()
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    message = answer.choices[0].message
    assert message.content == "hello" and message.model_extra == {"reasoning_content": "which?", "reasoning": "which?"}
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]  # type: ignore[union-attr]
    assert calls == [("paint", {"colour": "red", "n": 1}), ("move", {"x": 2})]
    assert answer.choices[0].finish_reason == "tool_calls"
    content, streamed = "", {}
    thoughts = {"reasoning_content": "", "reasoning": ""}
    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for name in thoughts:
            thoughts[name] += (delta.model_extra or {}).get(name, "")
        for call in delta.tool_calls or []:
            assert call.function is not None
            entry = streamed.setdefault(call.index, {"name": "", "arguments": ""})
            entry["name"] += call.function.name or ""
            entry["arguments"] += call.function.arguments or ""
    assert content == "hello" and thoughts == {"reasoning_content": "which?", "reasoning": "which?"}
    assert [(entry["name"], json.loads(entry["arguments"])) for entry in streamed.values()] == calls
    again: Any = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": (message.tool_calls or [])[0].id, "content": "done"},
    ]
    assert client.chat.completions.create(model="tiny", messages=again, tools=TOOLS).choices
    one = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or []) == 1
    none = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.tool_calls is None and "<tool_call>" in (none.choices[0].message.content or "")
    no_thought = server.post("/v1/chat/completions", {"messages": MESSAGES, "include_reasoning": False}).json()
    assert not {"reasoning_content", "reasoning"} & no_thought["choices"][0]["message"].keys()


def test_values_of_calls_are_typed_by_the_tools_schema(start: Start) -> None:
    written = "<tool_call>\n<function=paint>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"
    tokenizer = byte_level(chat_template=TEMPLATE + "{# <function=f><parameter=p> #}")
    client = start(FakeEngine(tokenizer.encode(written), eos_id=EOS), tokenizer=tokenizer).client()
    message = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "function" and (call.function.name, call.function.arguments) == ("paint", '{"n": 1}')
    assert message.content is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_of_earlier_answers_reach_the_template(start: Start, name: str) -> None:
    server = start(tokenizer=byte_level(chat_template="{{ messages[-1].reasoning_content }}"))
    earlier = {"role": "assistant", "content": "hello", name: "which?"}
    tokens = server.post("/tokenize", {"messages": [*MESSAGES, earlier]}).json()["tokens"]
    assert TOKENIZER.decode(tokens) == "which?"


def test_a_model_that_is_told_of_no_tools_can_be_made_to_call_one(start: Start) -> None:
    server = start(random_engine())
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 900}
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        answer = server.post("/v1/chat/completions", {**body, "tool_choice": choice, "parallel_tool_calls": False})
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] in ("paint", "move") and json.loads(call["function"]["arguments"])
    assert_error(server.post("/v1/chat/completions", {**body, "tool_choice": "auto"}), 400, "no tools", "tools")


def test_tools_reach_the_template_unless_none_may_be_called(start: Start) -> None:
    tokenizer = byte_level(chat_template=TEMPLATE)
    server = start(FakeEngine(eos_id=EOS), tokenizer=tokenizer)
    with_tools = server.post("/tokenize", {"messages": MESSAGES, "tools": TOOLS}).json()["tokens"]
    assert '"name": "paint"' in TOKENIZER.decode(with_tools)
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none", "max_tokens": 1, "return_token_ids": True}
    without = server.post("/v1/chat/completions", body).json()["prompt_token_ids"]
    assert "paint" not in TOKENIZER.decode(without)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "a" * 100_000}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "x"}, "guided_grammar"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "a", "ignore_eos": True}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regexp": "a"}}, "regexp"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    ({"tools": TOOLS * 100}, "tools"),
    ({"tools": [{"type": "retrieval"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
]


def test_what_cannot_be_guided_is_refused_by_name(start: Start) -> None:
    tokenizer = byte_level(chat_template=TEMPLATE)
    server = start(FakeEngine(eos_id=EOS), tokenizer=tokenizer)
    for fields, param in REFUSED:
        assert_error(server.post("/v1/chat/completions", {"messages": MESSAGES} | fields), 400, "", param)
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "string", "pattern": "("}}}
    forced = {"messages": MESSAGES, "tools": [bad], "tool_choice": "required"}
    assert_error(server.post("/v1/chat/completions", forced), 400, "", "tools")
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]
    broken = {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": calls}]}
    assert_error(server.post("/v1/chat/completions", broken), 400, "not valid JSON", "messages")
    assert server.fake.added == []
    no_tools = start()
    assert_error(
        no_tools.post("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS}), 400, "no tools", "tools"
    )
    bare = start(FakeEngine(), tokenizer=None)
    assert_error(
        bare.post("/v1/completions", {"prompt": [1], "guided_regex": "a"}), 400, "needs a tokenizer", "guided_regex"
    )


def test_the_official_client_names_the_field(start: Start) -> None:
    client = start().client()
    with pytest.raises(openai.BadRequestError) as caught:
        bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=bad)
    assert caught.value.param == "response_format"
