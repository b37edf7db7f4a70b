"""Turns token outputs of an HTTP call's requests into OpenAI's answers: whole ones, or server-sent events.

One call may hold several requests (a list of prompts) of several sequences each (`n`); a choice's index counts them
all, prompt by prompt.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence

from pydantic import BaseModel

from autodeploy.errors import AutoDeployError, EngineDeadError
from autodeploy.outputs import CompletionOutput, OutputCollector, OutputDelta
from autodeploy.runtime.async_engine import TokenStream
from autodeploy.runtime.request import Logprob
from autodeploy.runtime.tokenizer import Tokenizer
from autodeploy.server.protocol import (
    AnswerDelta,
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    TokenLogprob,
    Usage,
)


class RequestFailedError(AutoDeployError):
    """The engine gave up on one request; the message is the engine's reason."""


def public_message(error: AutoDeployError) -> str:
    """What a client may read of a failure; what else an exception says stays in the log."""
    if isinstance(error, RequestFailedError):
        return f"the request failed: {error}"
    return "the engine has stopped" if isinstance(error, EngineDeadError) else "the request failed"


class Generation:
    """The requests of one HTTP call while they run.

    Args:
        stream: has the collectors' requests and no others.
        collectors: one per prompt, in order.
    """

    def __init__(self, stream: TokenStream, collectors: Sequence[OutputCollector]):
        self.stream = stream
        self.collectors = list(collectors)
        self._by_request = {collector.request_id: collector for collector in collectors}
        sizes = [collector.params.n for collector in collectors]
        self._first_choice = {
            collector.request_id: sum(sizes[:position]) for position, collector in enumerate(collectors)
        }

    @property
    def num_choices(self) -> int:
        return sum(collector.params.n for collector in self.collectors)

    async def deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """(choice index, what is new) until all have ended.

        Raises:
            RequestFailedError: the engine gave up on one of the requests.
            EngineDeadError: the engine stopped.
        """
        async for output in self.stream:
            delta = self._by_request[output.request_id].add(output)
            if delta is None:
                continue
            if delta.finish_reason == "error":
                raise RequestFailedError(str(delta.stop_reason or "the request failed"))
            yield self._first_choice[output.request_id] + delta.index, delta

    async def finish(self) -> list[CompletionOutput]:
        """Wait for the end; every choice in order. Raises as `deltas` does."""
        async for _ in self.deltas():
            pass
        return [output for collector in self.collectors for output in collector.snapshot().outputs]

    def usage(self) -> Usage:
        """Tokens so far."""
        outputs = [collector.snapshot() for collector in self.collectors]
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class TokenNames:
    """Tokens as text, for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def name(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def completion_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None, offset: int
    ) -> CompletionLogprobs | None:
        """OpenAI's older form. offset: characters of text before the first token."""
        if logprobs is None:
            return None
        tokens = [self.name(token_id) for token_id in token_ids]
        chosen = [entry[token_id].logprob for token_id, entry in zip(token_ids, logprobs, strict=True)]
        top = [
            {self.name(token_id): item.logprob for token_id, item in _least_likely_first(entry)} for entry in logprobs
        ]
        offsets = [offset + sum(len(token) for token in tokens[:position]) for position in range(len(tokens))]
        return CompletionLogprobs(tokens=tokens, token_logprobs=chosen, top_logprobs=top, text_offset=offsets)

    def chat_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None, top: int
    ) -> ChatLogprobs | None:
        """OpenAI's newer form, with the `top` most likely tokens in each place."""
        if logprobs is None:
            return None
        content = []
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            likeliest = [
                self._token(other, item.logprob)
                for other, item in reversed(_least_likely_first(entry))
                if item.rank <= top
            ]
            own = self._token(token_id, entry[token_id].logprob)
            content.append(ChatTokenLogprob(**own.model_dump(), top_logprobs=likeliest))
        return ChatLogprobs(content=content)

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        name = self.name(token_id)
        return TokenLogprob(token=name, logprob=logprob, bytes=list(name.encode()))


def _least_likely_first(entry: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    """In this order, the likelier of two tokens with the same text wins a place in a dict."""
    return sorted(entry.items(), key=lambda item: -item[1].rank)


def completion_response(
    answer_id: str, model: str, outputs: Sequence[CompletionOutput], usage: Usage, names: TokenNames
) -> CompletionResponse:
    choices = [
        CompletionChoice(
            index=index,
            text=output.text,
            logprobs=names.completion_logprobs(output.token_ids, output.logprobs, 0),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        for index, output in enumerate(outputs)
    ]
    return CompletionResponse(id=answer_id, model=model, choices=choices, usage=usage)


async def completion_chunks(
    answer_id: str, model: str, generation: Generation, names: TokenNames, include_usage: bool
) -> AsyncIterator[CompletionResponse]:
    """A completion piece by piece."""
    offsets = [0] * generation.num_choices
    async for index, delta in generation.deltas():
        logprobs = names.completion_logprobs(delta.token_ids, delta.logprobs, offsets[index])
        if logprobs is not None:
            offsets[index] += sum(len(token) for token in logprobs.tokens)
        if delta.text or delta.finish_reason or logprobs is not None:
            choice = CompletionChoice(
                index=index,
                text=delta.text,
                logprobs=logprobs,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
            yield CompletionResponse(id=answer_id, model=model, choices=[choice])
    if include_usage:
        yield CompletionResponse(id=answer_id, model=model, choices=[], usage=generation.usage())


def chat_response(
    answer_id: str, model: str, outputs: Sequence[CompletionOutput], usage: Usage, names: TokenNames, top: int
) -> ChatCompletionResponse:
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=output.text),
            logprobs=names.chat_logprobs(output.token_ids, output.logprobs, top),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        for index, output in enumerate(outputs)
    ]
    return ChatCompletionResponse(id=answer_id, model=model, choices=choices, usage=usage)


async def chat_chunks(
    answer_id: str, model: str, generation: Generation, names: TokenNames, include_usage: bool, top: int
) -> AsyncIterator[ChatCompletionChunk]:
    """A chat answer piece by piece; the first chunk of every choice says who speaks."""
    for index in range(generation.num_choices):
        first = ChatChunkChoice(index=index, delta=AnswerDelta(role="assistant", content=""))
        yield ChatCompletionChunk(id=answer_id, model=model, choices=[first])
    async for index, delta in generation.deltas():
        logprobs = names.chat_logprobs(delta.token_ids, delta.logprobs, top)
        if delta.text or delta.finish_reason or logprobs is not None:
            choice = ChatChunkChoice(
                index=index,
                delta=AnswerDelta(content=delta.text) if delta.text else AnswerDelta(),
                logprobs=logprobs,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
            yield ChatCompletionChunk(id=answer_id, model=model, choices=[choice])
    if include_usage:
        yield ChatCompletionChunk(id=answer_id, model=model, choices=[], usage=generation.usage())


async def server_sent_events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    """Chunks as `data:` lines, `[DONE]` at the end. An error after the start can only be told as an event."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n"
    except AutoDeployError as error:
        detail = {"message": public_message(error), "type": "server_error", "param": None, "code": None}
        yield f"data: {json.dumps({'error': detail})}\n\n"
    yield "data: [DONE]\n\n"
