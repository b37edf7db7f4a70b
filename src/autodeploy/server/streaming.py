"""Turns token outputs of an HTTP call's requests into OpenAI's answers: whole ones, or server-sent events.

One call may hold several requests (a list of prompts) of several sequences each (`n`); a choice's index counts them
all, prompt by prompt.
"""

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from autodeploy.errors import AutoDeployError, InvalidRequestError
from autodeploy.outputs import CompletionOutput, OutputCollector, OutputDelta
from autodeploy.runtime.async_engine import TokenStream
from autodeploy.runtime.constraints import FAULTS_OF_REQUESTS
from autodeploy.server.answer_reader import AnswerPlan
from autodeploy.server.answers import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    PromptTokensDetails,
    Usage,
)
from autodeploy.server.failures import RequestFailedError, public_message
from autodeploy.server.logprobs import Entries, TokenNames
from autodeploy.server.metrics import RequestWatch
from autodeploy.server.request_trace import note_failure
from autodeploy.server.text_chunks import TextChunks

Chunk = BaseModel | str
"""A piece of a stream, as a typed model or as its JSON."""


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """What one call's answer looks like.

    Attributes:
        created: seconds since 1970; of all chunks of a stream.
        usage, usage_in_every_chunk: whether a stream tells the tokens used, at its end or all along.
        token_ids: answers carry token ids besides text.
        prompt_logprobs: answers carry the prompt's log-probabilities, in vLLM's form.
        top_logprobs: most likely tokens told in each place of a chat answer.
        echoes: texts of the prompts, for completions that begin with them.
        only_scores: the answer is the prompt alone.
        plan: what a chat answer may hold besides text.
    """

    answer_id: str
    model: str
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))
    usage: bool = False
    usage_in_every_chunk: bool = False
    token_ids: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    echoes: Sequence[str] | None = None
    only_scores: bool = False
    plan: AnswerPlan = field(default_factory=AnswerPlan)

    def has_only_text(self, delta: OutputDelta) -> bool:
        """Whether the chunk of this output says nothing but its text."""
        told_besides = self.token_ids or self.usage_in_every_chunk or self.only_scores or delta.logprobs is not None
        return not (told_besides or delta.finish_reason or delta.stop_reason is not None)


class Generation:
    """The requests of one HTTP call while they run.

    Args:
        stream: has the collectors' requests and no others.
        collectors: one per prompt, in order.
        watch: is shown every delta.
    """

    def __init__(self, stream: TokenStream, collectors: Sequence[OutputCollector], watch: RequestWatch | None = None):
        self.stream = stream
        self._watch = watch
        self.collectors = list(collectors)
        self._by_request = {collector.request_id: collector for collector in collectors}
        sizes = [collector.params.n for collector in collectors]
        self._first_choice = {
            collector.request_id: sum(sizes[:position]) for position, collector in enumerate(collectors)
        }
        self.prompt_of = [position for position, size in enumerate(sizes) for _ in range(size)]
        """the prompt of each choice"""

    def close(self) -> None:
        """The call is over, whichever way: what still runs is aborted."""
        self.stream.close()
        if self._watch is not None:
            self._watch.close()

    @property
    def num_choices(self) -> int:
        return len(self.prompt_of)

    async def deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """(choice index, what is new) until all have ended.

        Raises:
            InvalidRequestError: the request asks for what cannot be, which may show only now.
            RequestFailedError: the engine gave up on one of the requests.
            EngineDeadError: the engine stopped.
        """
        async for output in self.stream:
            delta = self._by_request[output.request_id].add(output)
            if delta is None:
                continue
            if self._watch is not None:
                self._watch.see(output.request_id, delta)
            if delta.finish_reason == "error" and delta.stop_reason in FAULTS_OF_REQUESTS:
                raise InvalidRequestError(str(delta.stop_reason))
            if delta.finish_reason == "error":
                raise RequestFailedError(str(delta.stop_reason or "the request failed"))
            yield self._first_choice[output.request_id] + delta.index, delta

    async def finish(self) -> list[CompletionOutput]:
        """Wait for the end; every choice in order. Raises as `deltas` does."""
        async for _ in self.deltas():
            pass
        return [output for collector in self.collectors for output in collector.snapshot().outputs]

    def usage(self, form: AnswerForm) -> Usage:
        """Tokens so far."""
        prompt = sum(len(collector.prompt_token_ids) for collector in self.collectors)
        completion = 0 if form.only_scores else sum(collector.num_output_tokens for collector in self.collectors)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(collector.num_cached_tokens or 0 for collector in self.collectors)
            ),
        )


def completion_response(
    form: AnswerForm, generation: Generation, outputs: Sequence[CompletionOutput]
) -> CompletionResponse:
    choices = []
    for index, output in enumerate(outputs):
        collector = generation.collectors[generation.prompt_of[index]]
        echo = None if form.echoes is None else form.echoes[generation.prompt_of[index]]
        prompt = (echo, collector.prompt_token_ids, collector.prompt_logprobs)
        text, logprobs = _completion_piece(form, prompt, (output.text, output.token_ids, output.logprobs), 0)
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            prompt_logprobs=form.names.prompt_logprobs(collector.prompt_logprobs if form.prompt_logprobs else None),
            token_ids=output.token_ids if form.token_ids else None,
            prompt_token_ids=collector.prompt_token_ids if form.token_ids else None,
        )
        choices.append(choice)
    return _completion(form, choices, generation.usage(form))


def _completion(form: AnswerForm, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
    return CompletionResponse(id=form.answer_id, created=form.created, model=form.model, choices=choices, usage=usage)


async def completion_chunks(form: AnswerForm, generation: Generation) -> AsyncIterator[Chunk]:
    """A completion piece by piece; where prompts are repeated, they come with each choice's first piece."""
    texts = TextChunks(lambda index, text: _completion(form, [CompletionChoice(index=index, text=text)], None))
    is_begun = [form.echoes is None] * generation.num_choices
    offsets = [0] * generation.num_choices
    async for index, delta in generation.deltas():
        if is_begun[index] and form.has_only_text(delta):
            if delta.text:
                yield texts.json(index, delta.text)
            continue
        position = generation.prompt_of[index]
        echo = None if is_begun[index] or form.echoes is None else form.echoes[position]
        is_begun[index] = True
        prompt = (echo, generation.collectors[position].prompt_token_ids, delta.prompt_logprobs)
        piece = (delta.text, delta.token_ids, delta.logprobs)
        text, logprobs = _completion_piece(form, prompt, piece, offsets[index])
        offsets[index] += sum(map(len, logprobs.tokens)) if logprobs is not None else 0
        if text or delta.finish_reason or logprobs is not None or form.token_ids:
            choice = CompletionChoice(
                index=index,
                text=text,
                logprobs=logprobs,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
                token_ids=delta.token_ids if form.token_ids else None,
            )
            usage = generation.usage(form) if form.usage_in_every_chunk else None
            yield _completion(form, [choice], usage)
    if form.usage:
        yield _completion(form, [], generation.usage(form))


def _completion_piece(
    form: AnswerForm,
    prompt: tuple[str | None, Sequence[int], Entries | None],
    piece: tuple[str, Sequence[int], Entries | None],
    offset: int,
) -> tuple[str, CompletionLogprobs | None]:
    """Text and log-probabilities of a piece, behind those of its prompt, whose text is None unless it is repeated."""
    text, token_ids, entries = piece
    if form.only_scores:
        text, token_ids, entries = "", (), None if entries is None else ()
    echo, prompt_token_ids, prompt_entries = prompt
    if echo is not None:
        text, token_ids = echo + text, [*prompt_token_ids, *token_ids]
        entries = None if entries is None else [*(prompt_entries or ()), *entries]
    return text, None if entries is None else form.names.completion_logprobs(token_ids, entries, offset)


async def server_sent_events(chunks: AsyncIterator[Chunk]) -> AsyncIterator[str]:
    """Chunks as `data:` lines, `[DONE]` at the end. An error after the start can only be told as an event."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk if isinstance(chunk, str) else chunk.model_dump_json()}\n\n"
    except AutoDeployError as error:
        message, kind = public_message(error), "server_error"
        if isinstance(error, InvalidRequestError):
            message, kind = str(error), "invalid_request_error"
        note_failure(message)
        detail = {"message": message, "type": kind, "param": None, "code": None}
        yield f"data: {json.dumps({'error': detail})}\n\n"
    yield "data: [DONE]\n\n"
