"""Chunks that add text alone: they read as their typed models do, whatever the text and the names around it."""

import json
from collections.abc import Callable

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

TEXTS = ["a", '"', "\\", "\n\r\t\b\f", "\0", '"\\u0000"', "\x1f\x7f\u2028", "é漢😀", "</script>", "data: [DONE]\n\n"]


def completion(index: int, text: str) -> CompletionResponse:
    return CompletionResponse(id="x", created=7, model="\0", choices=[CompletionChoice(index=index, text=text)])


def content(index: int, text: str) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=index, delta=AnswerDelta(content=text))
    return ChatCompletionChunk(id='"\0"', created=7, model="\\", choices=[choice])


def thought(index: int, text: str) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=index, delta=AnswerDelta(reasoning_content=text))
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
