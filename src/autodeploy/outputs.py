"""What a caller gets back: token outputs of the engine go in, request outputs with text come out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autodeploy.runtime.request import Logprob, SamplingParams, TokenOutput
from autodeploy.runtime.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer


@dataclass(kw_only=True)
class CompletionOutput:
    """One generated sequence of a request.

    Attributes:
        index: which of the request's `n` sequences.
        text: generated text; "" without a tokenizer or with `detokenize=False`.
        token_ids: generated tokens, the stop token included.
        cumulative_logprob: sum over the generated tokens' log-probabilities, when log-probabilities were asked for.
        logprobs: per generated token, log-probabilities by token id.
        finish_reason: `stop`, `length`, `abort`, `timeout` or `error`; None while it is going on.
        stop_reason: the stop string or stop token that ended it; None when the model ended by itself. With an error or
            a timeout, one sentence that says why.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds on the clock of `time.monotonic`; None: not yet.

    `first_scheduled_time` is when the first of its sequences left the queue.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A request and what has been generated for it so far.

    Attributes:
        prompt: the prompt's text; None when it was given as token ids.
        outputs: one entry per sequence, by index.
        prompt_logprobs: per token of the prompt, log-probabilities by token id, None for the first; when asked for.
        finished: True when no sequence will grow any more.
        num_cached_tokens: tokens of the prompt whose states were found in the prefix cache; of several sequences, which
            find what the first one computed, those of the one that found least. None before the first output.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None


@dataclass(kw_only=True)
class OutputDelta:
    """What one token output added to a sequence, as text and tokens. Fields as in `CompletionOutput`."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class OutputCollector:
    """Gathers the token outputs of one request: detokenises them, applies stop strings, keeps the sum.

    Args:
        tokenizer: None leaves every text empty.
        abort: called with a sequence's index when a stop string ends it before the engine knows.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        abort: Callable[[int], None],
        *,
        prompt: str | None = None,
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = list(prompt_token_ids)
        self.params = params
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.num_cached_tokens: int | None = None
        self._abort = abort
        self._outputs = [_empty_output(index, params) for index in range(params.n)]
        wants_text = tokenizer is not None and params.detokenize
        self._texts = [_SequenceText(tokenizer, params) if tokenizer and wants_text else None for _ in range(params.n)]

    @property
    def finished(self) -> bool:
        return all(output.finish_reason for output in self._outputs)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.num_tokens_of_each)

    @property
    def num_tokens_of_each(self) -> list[int]:
        """Generated tokens per sequence."""
        return [len(output.token_ids) for output in self._outputs]

    def add(self, token_output: TokenOutput) -> OutputDelta | None:
        """Add what one step produced; None when its sequence had already ended (by a stop string, say)."""
        sequence = self._outputs[token_output.index]
        if sequence.finish_reason is not None:
            return None
        num_cached_tokens = token_output.num_cached_tokens
        if self.num_cached_tokens is None or num_cached_tokens < self.num_cached_tokens:
            self.num_cached_tokens = num_cached_tokens
        delta = self._delta(token_output)
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        sequence.text += delta.text
        sequence.token_ids += delta.token_ids
        if sequence.logprobs is not None and delta.logprobs is not None:
            sequence.logprobs += delta.logprobs
            chosen = zip(delta.token_ids, delta.logprobs, strict=True)
            sampled = sum(logprobs[token_id].logprob for token_id, logprobs in chosen)
            sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + sampled
        sequence.finish_reason, sequence.stop_reason = delta.finish_reason, delta.stop_reason
        if self.metrics.first_scheduled_time is None:
            self.metrics.first_scheduled_time = token_output.first_scheduled_time
        self._note_times(delta)
        return delta

    def snapshot(self) -> RequestOutput:
        """The request so far; later tokens do not change what is returned."""
        outputs = [
            CompletionOutput(
                index=output.index,
                text=output.text,
                token_ids=list(output.token_ids),
                cumulative_logprob=output.cumulative_logprob,
                logprobs=None if output.logprobs is None else list(output.logprobs),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
            for output in self._outputs
        ]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=RequestMetrics(**vars(self.metrics)),
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _delta(self, token_output: TokenOutput) -> OutputDelta:
        text, used, stop = "", len(token_output.token_ids), None
        sequence_text = self._texts[token_output.index]
        if sequence_text is not None:
            text, used, stop = sequence_text.push(token_output.token_ids, token_output.finish_reason)
        if stop is not None and token_output.finish_reason is None:
            self._abort(token_output.index)
        return OutputDelta(
            index=token_output.index,
            text=text,
            token_ids=list(token_output.token_ids[:used]),
            logprobs=None if token_output.logprobs is None else token_output.logprobs[:used],
            finish_reason="stop" if stop is not None else token_output.finish_reason,
            stop_reason=stop if stop is not None else token_output.stop_reason,
            prompt_logprobs=token_output.prompt_logprobs,
        )

    def _note_times(self, delta: OutputDelta) -> None:
        if delta.token_ids and self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.monotonic()
        if delta.finish_reason is not None and self.finished:
            self.metrics.finished_time = time.monotonic()


def _empty_output(index: int, params: SamplingParams) -> CompletionOutput:
    wants_logprobs = params.logprobs is not None
    return CompletionOutput(
        index=index,
        logprobs=[] if wants_logprobs else None,
        cumulative_logprob=0.0 if wants_logprobs else None,
    )


class _SequenceText:
    """The text of one sequence: detokenising and stop strings."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        stops = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopMatcher(stops, include_in_output=params.include_stop_str_in_output)
        self._shows_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], finish_reason: str | None) -> tuple[str, int, str | None]:
        """Returns (new text, how many of the tokens belong to the output, the stop string that was met)."""
        shown = ""
        # The token that stopped the model is an order, not text.
        hides_last = finish_reason == "stop" and not self._shows_stop
        for position, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if hides_last and position == len(token_ids) - 1:
                continue
            piece = self._detokenizer.push(token_id)
            if self._num_tokens <= self._min_tokens:
                shown += piece
                continue
            piece, stop = self._matcher.push(piece)
            shown += piece
            if stop is not None:
                return shown, position + 1, stop
        if finish_reason is not None:
            piece, stop = self._matcher.push(self._detokenizer.flush())
            shown += piece if stop is not None else piece + self._matcher.flush()
            return shown, len(token_ids), stop
        return shown, len(token_ids), None
