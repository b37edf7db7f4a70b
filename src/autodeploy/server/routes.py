"""The routes that run the model: a checked request goes to the engine, its answer comes back whole or as a stream.

A client that goes away takes its requests with it.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from autodeploy.errors import EngineOverloadedError, InvalidRequestError
from autodeploy.outputs import CompletionOutput, OutputCollector
from autodeploy.runtime.request import RequestOptions, SamplingParams
from autodeploy.runtime.tokenizer import with_token_ids
from autodeploy.server import chat, streaming
from autodeploy.server.answer_parts import THOUGHT_BEGINS, THOUGHT_ENDS
from autodeploy.server.answer_reader import AnswerPlan
from autodeploy.server.failures import ClientDisconnectedError
from autodeploy.server.logprobs import TokenNames
from autodeploy.server.logs import REQUEST_ID
from autodeploy.server.metrics import ServingMetrics
from autodeploy.server.options import ServerOptions
from autodeploy.server.prompts import PromptReader
from autodeploy.server.request_trace import note_collectors, note_request
from autodeploy.server.requests import ChatCompletionRequest, CompletionRequest, SamplingRequest
from autodeploy.server.served import ServedModel
from autodeploy.server.streaming import AnswerForm, Chunk, Generation
from autodeploy.server.tool_calls import tool_format

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

Whole = Callable[[AnswerForm, Generation, Sequence[CompletionOutput]], BaseModel]
Chunks = Callable[[AnswerForm, Generation], AsyncIterator[Chunk]]


class GenerationRoutes:
    """`/v1/completions` and `/v1/chat/completions`."""

    def __init__(self, served: ServedModel, metrics: ServingMetrics, options: ServerOptions):
        self._served = served
        self._metrics = metrics
        self._most_sequences = options.max_sequences_per_request
        self._timeout_seconds = options.request_timeout_seconds
        self._prompts = PromptReader(served)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        model = self._served.checked_name(body.model)
        params = await self._params(body)
        prompts = body.prompts()
        if not prompts:
            raise InvalidRequestError("the prompt is empty; give at least one", "prompt")
        if len(prompts) * params.n > self._most_sequences:
            raise InvalidRequestError(
                f"{len(prompts)} prompts times n={params.n} are more than {self._most_sequences} sequences; "
                "send several requests",
                "prompt" if len(prompts) > 1 else "n",
            )
        token_ids = [await self._prompts.encode(prompt, body) for prompt in prompts]
        echoes = None
        if body.echo:
            echoes = [self._prompts.text(prompt, ids) for prompt, ids in zip(prompts, token_ids, strict=True)]
        form = self._form("cmpl", model, body, echoes=echoes, only_scores=body.only_scores, names=self._names(body))
        return await self._answer(
            request, form, body, token_ids, params, streaming.completion_response, streaming.completion_chunks
        )

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        model = self._served.checked_name(body.model)
        params = await self._params(body)
        if params.n > self._most_sequences:
            raise InvalidRequestError(f"n={params.n} is more than {self._most_sequences} sequences", "n")
        token_ids = await self._prompts.encode_chat(body, truncate=body.truncate_prompt_tokens)
        plan, top = self._plan(body, token_ids), body.top_logprobs or 0
        form = self._form("chatcmpl", model, body, top_logprobs=top, names=self._names(body), plan=plan)
        return await self._answer(request, form, body, [token_ids], params, chat.chat_response, chat.chat_chunks)

    async def _params(self, body: CompletionRequest | ChatCompletionRequest) -> SamplingParams:
        """Checked parameters. What a guided request asks for is compiled here, in a thread, where it can be refused."""
        params = with_token_ids(body.sampling_params(self._served.default_sampling), self._served.tokenizer)
        guidance = body.guidance()
        if guidance is not None:
            try:
                await asyncio.to_thread(self._served.constraints.check, params)
            except InvalidRequestError as error:
                raise InvalidRequestError(str(error), guidance[0]) from error
        return params

    def _plan(self, body: ChatCompletionRequest, prompt: Sequence[int]) -> AnswerPlan:
        """What the answer may hold, by the model's own chat template and what the request asks for."""
        names = [tool.function.name for tool in body.tools or ()]
        if body.forced_tool is not None:
            return AnswerPlan(only_arguments_of=body.forced_tool.function.name)
        one_call = body.parallel_tool_calls is False
        if body.must_call:
            return AnswerPlan(only_calls=True, tool_names=names, one_call=one_call)
        if body.guidance() is not None:
            return AnswerPlan()
        template = self._served.chat_template
        begun = self._served.require_tokenizer("messages").decode(prompt[-8:], skip_special_tokens=False)
        return AnswerPlan(
            thoughts=THOUGHT_ENDS in template,
            is_thinking=begun.rstrip().endswith(THOUGHT_BEGINS),
            shows_thoughts=body.include_reasoning is not False,
            tool_format=tool_format(template) if body.may_call else None,
            tool_names=names,
            tool_parameters={tool.function.name: tool.function.parameters or {} for tool in body.tools or ()},
            one_call=one_call,
        )

    def _names(self, body: SamplingRequest) -> TokenNames:
        return TokenNames(self._served.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))

    @staticmethod
    def _form(kind: str, model: str, body: SamplingRequest, **own: Any) -> AnswerForm:
        return AnswerForm(
            answer_id=f"{kind}-{body.request_id or REQUEST_ID.get()}",
            model=model,
            usage=body.wants_usage,
            usage_in_every_chunk=body.wants_usage_in_every_chunk,
            token_ids=bool(body.return_token_ids),
            prompt_logprobs=body.prompt_logprobs is not None,
            **own,
        )

    async def _answer(
        self,
        request: Request,
        form: AnswerForm,
        body: SamplingRequest,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        make_whole: Whole,
        make_chunks: Chunks,
    ) -> Response:
        operation = "chat" if isinstance(body, ChatCompletionRequest) else "text_completion"
        note_request(operation, form.model, form.answer_id, params, bool(body.stream))
        start = self._start(prompts, params, body.engine_options(self._timeout_seconds))
        if body.stream:
            generation = await until_disconnect(request.receive, start)
            return _EventStream(streaming.server_sent_events(make_chunks(form, generation)), generation)

        async def whole() -> Response:
            generation = await start
            with closing(generation):
                outputs = await generation.finish()
            answer = make_whole(form, generation, outputs)
            return Response(answer.model_dump_json(), media_type="application/json")

        return await until_disconnect(request.receive, whole())

    async def _start(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, options: RequestOptions
    ) -> Generation:
        """Give all prompts to the engine; the engine has accepted all of them, or none when an error is raised."""
        stream = self._served.engine.open()
        call_id = uuid.uuid4().hex
        collectors = []
        try:
            for position, token_ids in enumerate(prompts):
                request_id = f"{call_id}-{position}"
                abort = partial(stream.abort, request_id)
                # Its clock starts now: the engine takes new requests between two steps.
                collectors.append(OutputCollector(request_id, token_ids, params, self._served.tokenizer, abort))
                await stream.add(request_id, token_ids, params, **options)
        except BaseException as error:
            stream.close()
            if isinstance(error, EngineOverloadedError):
                self._metrics.note_rejection()
            raise
        note_collectors(collectors)
        return Generation(stream, collectors, self._metrics.watch(collectors))


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`; cancel it when the client goes away (ClientDisconnectedError)."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events of a generation, which is closed whichever way the answer ends."""

    def __init__(self, events: AsyncIterator[str], generation: Generation):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self.stream_response(send))
        except (ClientDisconnectedError, OSError):
            logger.info("a client went away before its answer was complete")
        finally:
            self._generation.close()
