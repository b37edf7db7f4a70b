"""Chunks that add text alone: they read as their typed models do, whatever the text and the names around it."""

import json
from collections.abc import Callable

import httpx
import pytest
from pydantic import BaseModel

from autodeploy.server.answers import (
    AnswerDelta,
    ChatChunkChoice,
    ChatCompletionChunk,
    CompletionChoice,
    CompletionResponse,
)
from autodeploy.server.text_chunks import TextChunks
from tests.server.running import MESSAGES, Start

TEXTS = ["a", '"', "\\", "\n\r\t\b\f", "\0", '"\\u0000"', "\x1f\x7f\u2028", "é漢😀", "</script>", "data: [DONE]\n\n"]


def completion(index: int, text: str) -> CompletionResponse:
    return CompletionResponse(id="x", created=7, model="\0", choices=[CompletionChoice(index=index, text=text)])


def content(index: int, text: str) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=index, delta=AnswerDelta(content=text))
    return ChatCompletionChunk(id='"\0"', created=7, model="\\", choices=[choice])


def thought(index: int, text: str) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=index, delta=AnswerDelta(reasoning_content=text, reasoning=text))
    return ChatCompletionChunk(id="x", created=7, model="é", choices=[choice])


@pytest.mark.parametrize("make", [completion, content, thought])
def test_they_are_written_as_the_models_themselves_are(make: Callable[[int, str], BaseModel]) -> None:
    chunks = TextChunks(make)
    for text in TEXTS:
        for index in (1, 0):
            written = chunks.json(index, text)
            expected = make(index, text)
            assert written == expected.model_dump_json()
            assert type(expected).model_validate_json(written) == expected
            assert "\n" not in written and json.loads(written)["choices"][0]["index"] == index


def test_a_stream_is_chunks_of_the_documented_type_and_of_one_moment(start: Start) -> None:
    server = start()
    kinds: list[tuple[str, dict[str, object], type[CompletionResponse | ChatCompletionChunk]]] = [
        ("completions", {"prompt": "hello"}, CompletionResponse),
        ("chat/completions", {"messages": MESSAGES}, ChatCompletionChunk),
    ]
    for path, prompt, model in kinds:
        body = {**prompt, "stream": True, "n": 2, "max_tokens": 100, "stream_options": {"include_usage": True}}
        events = httpx.post(f"{server.url}/v1/{path}", json=body).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [model.model_validate_json(event.removeprefix("data: ")) for event in events[:-2]]
        assert len(chunks) > 6 and {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {
            (chunks[0].id, chunks[0].created, "tiny")
        }
        assert chunks[-1].usage is not None and not any(chunk.usage for chunk in chunks[:-1])
