"""Chat answers: outputs of a request go in, messages with thoughts, text and calls come out, whole or in pieces."""

import secrets
import string
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from autodeploy.outputs import CompletionOutput, OutputDelta
from autodeploy.server.answer_parts import CallArguments, CallStart, Part, Text, Thought
from autodeploy.server.answers import (
    AnswerDelta,
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from autodeploy.server.streaming import AnswerForm, Chunk, Generation
from autodeploy.server.text_chunks import TextChunks

_ID_CHARACTERS = string.ascii_letters + string.digits


def chat_response(
    form: AnswerForm, generation: Generation, outputs: Sequence[CompletionOutput]
) -> ChatCompletionResponse:
    choices = []
    for index, output in enumerate(outputs):
        reader = form.plan.reader()
        message = _message(reader.push(output.text, is_last=True))
        choice = ChatChoice(
            index=index,
            message=message,
            logprobs=_logprobs(form, output),
            finish_reason=_finish_reason(output.finish_reason, reader.num_calls),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if form.token_ids else None,
        )
        choices.append(choice)
    (collector,) = generation.collectors
    return ChatCompletionResponse(
        id=form.answer_id,
        created=form.created,
        model=form.model,
        choices=choices,
        usage=generation.usage(form),
        prompt_logprobs=form.names.prompt_logprobs(collector.prompt_logprobs if form.prompt_logprobs else None),
        prompt_token_ids=collector.prompt_token_ids if form.token_ids else None,
    )


async def chat_chunks(form: AnswerForm, generation: Generation) -> AsyncIterator[Chunk]:
    """A chat answer piece by piece; the first chunk of every choice says who speaks."""
    readers = [form.plan.reader() for _ in range(generation.num_choices)]
    writers = {
        Text: TextChunks(lambda index, text: _delta_chunk(form, index, AnswerDelta(content=text))),
        Thought: TextChunks(lambda index, text: _delta_chunk(form, index, AnswerDelta(**_thought(text)))),
    }
    for index in range(generation.num_choices):
        yield _delta_chunk(form, index, AnswerDelta(role="assistant", content=""))
    async for index, delta in generation.deltas():
        logprobs = _logprobs(form, delta)
        parts = readers[index].push(delta.text, is_last=delta.finish_reason is not None)
        plain = [part for part in parts if isinstance(part, Text | Thought)]
        if form.has_only_text(delta) and len(plain) == len(parts):
            for part in plain:
                yield writers[type(part)].json(index, part.text)
        elif parts or delta.finish_reason or logprobs is not None or form.token_ids:
            choice = ChatChunkChoice(
                index=index,
                delta=_delta(parts),
                logprobs=logprobs,
                finish_reason=_finish_reason(delta.finish_reason, readers[index].num_calls),
                stop_reason=delta.stop_reason,
                token_ids=delta.token_ids if form.token_ids else None,
            )
            usage = generation.usage(form) if form.usage_in_every_chunk else None
            yield _chunk(form, [choice], usage)
    if form.usage:
        yield _chunk(form, [], generation.usage(form))


def _chunk(form: AnswerForm, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
    return ChatCompletionChunk(id=form.answer_id, created=form.created, model=form.model, choices=choices, usage=usage)


def _delta_chunk(form: AnswerForm, index: int, delta: AnswerDelta) -> ChatCompletionChunk:
    return _chunk(form, [ChatChunkChoice(index=index, delta=delta)], None)


def _message(parts: Iterable[Part]) -> AnswerMessage:
    content, thought = "", ""
    names: list[str] = []
    arguments: list[str] = []
    for part in parts:
        if isinstance(part, Text):
            content += part.text
        elif isinstance(part, Thought):
            thought += part.text
        elif isinstance(part, CallStart):
            names.append(part.name)
            arguments.append("")
        else:
            arguments[part.index] += part.text
    calls = [
        ToolCall(id=_call_id(), function=FunctionCall(name=name, arguments=text))
        for name, text in zip(names, arguments, strict=True)
    ]
    return AnswerMessage(
        content=content if content or not calls else None,
        tool_calls=calls or None,
        **_thought(thought.strip()),
    )


def _delta(parts: Iterable[Part]) -> AnswerDelta:
    content, thought = "", ""
    calls: list[ToolCallDelta] = []
    for part in parts:
        if isinstance(part, Text):
            content += part.text
        elif isinstance(part, Thought):
            thought += part.text
        elif isinstance(part, CallStart):
            function = FunctionCallDelta(name=part.name, arguments="")
            calls.append(ToolCallDelta(index=part.index, id=_call_id(), type="function", function=function))
        elif isinstance(part, CallArguments):
            calls.append(ToolCallDelta(index=part.index, function=FunctionCallDelta(arguments=part.text)))
    return AnswerDelta(content=content or None, tool_calls=calls or None, **_thought(thought))


def _thought(text: str) -> dict[str, Any]:
    """Under both of its names; none of an empty one."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _finish_reason(reason: str | None, num_calls: int) -> str | None:
    return "tool_calls" if reason == "stop" and num_calls else reason


def _call_id() -> str:
    """Nine letters and digits: some chat templates take no other ids back."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


def _logprobs(form: AnswerForm, output: CompletionOutput | OutputDelta) -> ChatLogprobs | None:
    if output.logprobs is None:
        return None
    return form.names.chat_logprobs(output.token_ids, output.logprobs, form.top_logprobs)
