"""LLM: a model and options go in, prompts become text. Builds a `Program`, gives it an engine, adds the text layer."""

import logging
import os
import queue
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn
from tqdm import tqdm

from autodeploy.compile.program import Program
from autodeploy.config import ModelOptions, Options, SpeculativeOptions, parse_options
from autodeploy.errors import AutoDeployError, EngineDeadError, InvalidRequestError
from autodeploy.graph.report import BuildReport
from autodeploy.instant_on import deploy
from autodeploy.models.locate import LocatedModel, locate_model
from autodeploy.outputs import OutputCollector, RequestOutput
from autodeploy.runtime.async_engine import AsyncEngine, Delivery
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.demo import DemoEngine
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.request import Limits, Request, SamplingParams, new_sequences
from autodeploy.runtime.stats import EngineStats
from autodeploy.runtime.tokenizer import Tokenizer, with_token_ids
from autodeploy.start_up import without_collection
from autodeploy.threads import release_threads

if TYPE_CHECKING:  # importing it takes longer than a start
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = SamplingParams().max_tokens

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`, each with `"cache_salt"` if wanted."""

_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with `role` and `content`."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One checked request, ready for the engine. `prompt` is None when it was given as token ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str | None

    def collector(self, request_id: str, tokenizer: Tokenizer | None, abort: Callable[[int], None]) -> OutputCollector:
        return OutputCollector(request_id, self.prompt_token_ids, self.params, tokenizer, abort, prompt=self.prompt)


class LLM:
    """A deployed language model.

    Args:
        model: a checkpoint folder, a GGUF file, a hub id, or any `nn.Module` (then give `tokenizer=` to use text).
        progress: called with one line whenever a stage of the build begins.
        options: flat options by name, see `autodeploy.config`; names that other engines use work too.
    Raises:
        ConfigError: an unknown option or a bad value.
        ModelNotFoundError, CheckpointError, UnsupportedModelError, OutOfMemoryError: from reading and building.

    Example:
        with LLM("path/to/model") as llm:
            print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ):
        parsed = parse_options(options)
        subject = model if isinstance(model, nn.Module) else locate_model(os.fspath(model), parsed.model)
        located = subject if isinstance(subject, LocatedModel) else None
        with without_collection():
            # Before the build, which takes longer: a missing tokenizer should be known at once.
            self.tokenizer = _load_tokenizer(located, parsed.model)
            program, self._successor = deploy(subject, parsed, progress)
        grammars = None
        if self.tokenizer is not None:
            grammars = GrammarCompiler(self.tokenizer, program.vocab_size, program.eos_token_ids)
        self.constraints = Constraints(grammars)
        length = parsed.model.max_model_len
        if parsed.engine.runtime == "demollm":
            engine: Engine | DemoEngine = DemoEngine(program, parsed.engine, length, grammars, progress=progress)
        else:
            draft = _draft_program(parsed, progress)
            engine = Engine(program, parsed.engine, length, self._successor, grammars, draft=draft, progress=progress)
        self.name = type(model).__name__ if located is None else located.name
        self.options: Options = parsed
        self.max_model_len: int = engine.max_model_len
        self.generation_defaults: dict[str, Any] = {} if located is None else located.generation_defaults
        self._limits = Limits(program.vocab_size, engine.max_model_len)
        self._warned_of_default_length = False
        release_threads()  # this thread has built; from now on the engine's thread computes
        self.async_engine = AsyncEngine(engine)
        # The thread holds the engine, not this object: when nobody holds this object any more, the thread ends too.
        self._finalizer = weakref.finalize(self, self.async_engine.shutdown)

    @property
    def program(self) -> Program:
        """The program that serves, or takes over at the next step."""
        successor = self._successor
        if successor is not None and successor.done() and successor.exception() is None:
            return successor.result()
        return self.async_engine.program

    def wait_until_built(self, timeout: float | None = None) -> None:
        """Return when the program will not be replaced by a better one any more (see the option `instant_on`).

        Args:
            timeout: seconds to wait.
        Raises:
            TimeoutError: it is still being built.
            AutoDeployError: it could not be built; serving goes on with the model's own code.
        """
        if self._successor is not None:
            self._successor.result(timeout)

    @property
    def report(self) -> BuildReport:
        """What the build did."""
        return self.program.report

    def stats(self) -> EngineStats:
        """The engine's counters as of its latest step."""
        return self.async_engine.stats()

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The Hugging Face tokenizer. Raises InvalidRequestError when there is none."""
        return self._require_tokenizer("nothing to return").hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no parameters: the model's own defaults over `SamplingParams()`."""
        return SamplingParams(**self.generation_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Generate for all prompts; one output per prompt, in their order.

        Args:
            prompts: one prompt or a list of them; a flat list of ints is one prompt.
            sampling_params: one for all prompts, or one per prompt.
            use_tqdm: show a progress bar on stderr.
            priority: lower runs sooner, among requests of other callers too.
        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served; nothing has been started then.
            EngineDeadError: the engine stopped.
        """
        return self._run(self._prepare(_as_list(prompts), sampling_params), use_tqdm, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them. The other arguments go to the model's chat template.

        Raises:
            InvalidRequestError: no chat template, messages that it refuses, or as for `generate`.
        """
        conversations = list(messages) if messages and not _is_conversation(messages) else [messages]
        prompts = [
            {
                "prompt_token_ids": self.apply_chat_template(
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                )
            }
            for conversation in conversations
        ]
        return self._run(self._prepare(prompts, sampling_params), use_tqdm, priority)

    def apply_chat_template(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of one conversation, for `generate` or `generate_async`. Raises InvalidRequestError as `chat`."""
        if not _is_conversation(messages):
            raise InvalidRequestError(
                "messages must be a non-empty list of dicts with 'role' and 'content', "
                "e.g. [{'role': 'user', 'content': 'Hello'}]",
                "messages",
            )
        return self._require_tokenizer("chat needs one").apply_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_arguments=chat_template_kwargs,
        )

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        priority: int = 0,
    ) -> "PendingOutput":
        """Generate for one prompt without blocking the event loop.

        `await` the result for the final output, or go through it with `async for`: with `streaming=True` it gives the
        output so far whenever it has grown, without it the final output only. The request starts when it is first
        awaited, and is aborted when the consumer is cancelled or leaves the loop.

        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served.
        """
        (work,) = self._prepare([prompt], sampling_params)
        return PendingOutput(self, work, streaming, priority)

    def shutdown(self) -> None:
        """Stop the engine; requests that still run get EngineDeadError. May be called again."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _prepare(
        self, prompts: Sequence[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Work]:
        """Check everything before anything is started."""
        works = []
        for prompt, params in zip(prompts, self._params_for(len(prompts), sampling_params), strict=True):
            text, token_ids = self._tokenize(prompt)
            params = with_token_ids(params, self.tokenizer)
            if params.stop and (self.tokenizer is None or not params.detokenize):
                raise InvalidRequestError("stop strings need text; without it, use stop_token_ids", "stop")
            # The engine checks with these functions too, but it would be too late: earlier prompts would be running.
            self.constraints.check(params)
            salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
            new_sequences(Request("check", token_ids, params, arrival=0, cache_salt=salt), self._limits)
            works.append(_Work(prompt=text, prompt_token_ids=token_ids, params=params, cache_salt=salt))
        return works

    def _params_for(
        self, num_prompts: int, sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        listed = list(sampling_params)
        if len(listed) != num_prompts:
            raise InvalidRequestError(
                f"{len(listed)} sampling params for {num_prompts} prompts; give one for all, or one per prompt",
                "sampling_params",
            )
        if not all(isinstance(params, SamplingParams) for params in listed):
            raise InvalidRequestError("sampling_params must be SamplingParams or a list of them", "sampling_params")
        return listed

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            given = {"prompt", "prompt_token_ids"} & prompt.keys()
            if unknown := prompt.keys() - _PROMPT_KEYS:
                raise InvalidRequestError(f"unknown prompt keys: {', '.join(map(repr, sorted(map(str, unknown))))}")
            if not given:
                raise InvalidRequestError("a prompt dict needs 'prompt' (text) or 'prompt_token_ids' (a list of ints)")
            if "prompt_token_ids" in given:
                text = prompt.get("prompt")
                return (text if isinstance(text, str) else None), self._tokenize(prompt["prompt_token_ids"])[1]
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            tokenizer = self._require_tokenizer("a text prompt needs one; pass token ids instead")
            if not prompt:
                raise InvalidRequestError("the prompt is empty; give at least one character", "prompt")
            return prompt, tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            return None, list(prompt)
        raise InvalidRequestError(
            f"a prompt must be text, token ids, or a dict with either; got {type(prompt).__name__}", "prompt"
        )

    def _require_tokenizer(self, why: str) -> Tokenizer:
        if self.tokenizer is None:
            skipped = self.options.model.skip_tokenizer_init
            reason = "skip_tokenizer_init=True" if skipped else "the model is a module and tokenizer= was not given"
            raise InvalidRequestError(f"there is no tokenizer ({reason}): {why}", "prompt")
        return self.tokenizer

    def _run(self, works: Sequence[_Work], use_tqdm: bool, priority: int) -> list[RequestOutput]:
        """Run all to the end; aborts what is unfinished when it is interrupted or a request fails."""
        run_id = f"generate-{uuid.uuid4().hex[:12]}"
        waiting = deque((f"{run_id}-{position}", work) for position, work in enumerate(works))
        order = [request_id for request_id, _ in waiting]
        running: dict[str, OutputCollector] = {}
        finished: dict[str, RequestOutput] = {}
        received: queue.SimpleQueue[tuple[str, Delivery]] = queue.SimpleQueue()
        try:
            with tqdm(total=len(works), desc="Generating", unit="prompt", disable=not use_tqdm) as bar:
                while waiting or running:
                    self._submit_what_fits(waiting, running, received, priority)
                    request_id = self._collect_until_one_is_finished(running, received)
                    finished[request_id] = running.pop(request_id).snapshot()
                    self.warn_of_default_length(finished[request_id])
                    bar.update()
        finally:
            for request_id in running:
                self.async_engine.abort(request_id)
        return [finished[request_id] for request_id in order]

    def _submit_what_fits(
        self,
        waiting: deque[tuple[str, _Work]],
        running: dict[str, OutputCollector],
        received: "queue.SimpleQueue[tuple[str, Delivery]]",
        priority: int,
    ) -> None:
        """Keep the engine's queue filled but not overfull, however many prompts there are."""
        room = self.options.engine.max_queued_requests - sum(collector.params.n for collector in running.values())
        while waiting and (not running or waiting[0][1].params.n <= room):
            request_id, work = waiting.popleft()
            room -= work.params.n
            abort = partial(self.async_engine.abort, request_id)
            running[request_id] = work.collector(request_id, self.tokenizer, abort)

            def deliver(delivery: Delivery, request_id: str = request_id) -> None:
                received.put((request_id, delivery))

            self.async_engine.submit(
                request_id,
                work.prompt_token_ids,
                work.params,
                deliver,
                priority=priority,
                cache_salt=work.cache_salt,
            )

    @staticmethod
    def _collect_until_one_is_finished(
        running: Mapping[str, OutputCollector], received: "queue.SimpleQueue[tuple[str, Delivery]]"
    ) -> str:
        while True:
            request_id, delivery = received.get()
            if isinstance(delivery, AutoDeployError):
                raise delivery
            if request_id not in running:
                continue  # the engine had not yet heard that a stop string ended it
            for token_output in delivery:
                running[request_id].add(token_output)
            if running[request_id].finished:
                return request_id

    def warn_of_default_length(self, output: RequestOutput) -> None:
        """Say once that the default of `max_tokens` cut an output: users of other engines do not expect 16."""
        cut = any(
            completion.finish_reason == "length" and len(completion.token_ids) == DEFAULT_MAX_TOKENS
            for completion in output.outputs
        )
        if cut and not self._warned_of_default_length:
            self._warned_of_default_length = True
            logger.warning(
                "an output was cut at max_tokens=%d, the default; set SamplingParams(max_tokens=...) for longer ones "
                "(said once)",
                DEFAULT_MAX_TOKENS,
            )


class PendingOutput:
    """An output that is being generated: `await` it, or go through it with `async for` (see `LLM.generate_async`)."""

    def __init__(self, llm: LLM, work: _Work, streaming: bool, priority: int):
        self.request_id = f"async-{uuid.uuid4().hex}"
        self._llm = llm
        self._work = work
        self._streaming = streaming
        self._priority = priority

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._last().__await__()

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._updates()

    async def _last(self) -> RequestOutput:
        last: RequestOutput | None = None
        async for output in self._updates():
            last = output
        if last is None:
            raise EngineDeadError("the request ended without an output")
        return last

    async def _updates(self) -> AsyncIterator[RequestOutput]:
        with self._llm.async_engine.open() as stream:
            abort = partial(stream.abort, self.request_id)
            collector = self._work.collector(self.request_id, self._llm.tokenizer, abort)
            work = self._work
            await stream.add(
                self.request_id,
                work.prompt_token_ids,
                work.params,
                priority=self._priority,
                cache_salt=work.cache_salt,
            )
            async for token_output in stream:
                collector.add(token_output)
                if self._streaming or collector.finished:
                    yield collector.snapshot()
        self._llm.warn_of_default_length(collector.snapshot())


def _draft_program(options: Options, progress: Callable[[str], None] | None) -> Program | None:
    """The draft model that `speculative_config` names, if it does, built like the model itself."""
    speculation = SpeculativeOptions.of(options.engine.speculative_config)
    if speculation is None or speculation.method != "draft_model":
        return None
    named = speculation.model
    # What was said of the model itself, its limit and its config, says nothing of this one.
    chosen = replace(options.model, revision=None, max_model_len=None, model_kwargs={})
    subject = named if isinstance(named, nn.Module) else locate_model(os.fspath(named), chosen)
    compiled = replace(options.compile, instant_on=False)
    return deploy(subject, replace(options, model=chosen, compile=compiled), progress)[0]


def _load_tokenizer(located: LocatedModel | None, options: ModelOptions) -> Tokenizer | None:
    if options.skip_tokenizer_init:
        return None
    if options.tokenizer is not None:
        return Tokenizer.from_folder(options.tokenizer, trust_remote_code=options.trust_remote_code)
    if located is None:
        return None
    return Tokenizer.from_folder(located.folder, trust_remote_code=options.trust_remote_code)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt or many -> a list of prompts. A flat list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(f"prompts must be text, token ids or a list; got {type(prompts).__name__}", "prompt")
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)


def _is_conversation(messages: Any) -> TypeGuard[Messages]:
    return (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in messages)
    )
