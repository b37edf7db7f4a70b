"""An engine that runs no model: it answers every prompt with scripted tokens, one per sequence and step."""

import math
import threading
import time
from collections.abc import Sequence
from typing import Unpack

from autodeploy.compile.program import Program
from autodeploy.errors import EngineOverloadedError, InvalidRequestError
from autodeploy.runtime.request import Logprob, RequestOptions, SamplingParams, TokenOutput
from autodeploy.runtime.stats import EngineStats


class FakeEngine:
    """Implements `TokenEngine`. Without a script, an answer repeats its prompt for ever.

    Args:
        script: tokens of every answer; after the last one comes `eos_id`.
        step_seconds: how long a step takes.
        crash_at_step: this step raises.
        hold: while set, steps wait.
    """

    program: Program

    def __init__(
        self,
        script: Sequence[int] | None = None,
        *,
        eos_id: int = 0,
        vocab_size: int = 1000,
        max_model_len: int = 4096,
        step_seconds: float = 0.0,
        crash_at_step: int | None = None,
        max_queued: int = 10_000,
        num_cached_tokens: int = 0,
    ):
        self.script = script
        self.eos_id = eos_id
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.step_seconds = step_seconds
        self.crash_at_step = crash_at_step
        self.max_queued = max_queued
        self.num_cached_tokens = num_cached_tokens
        self.hold = threading.Event()
        self.aborted: list[tuple[str, int | None]] = []
        self.added: list[str] = []
        self.options: dict[str, RequestOptions] = {}
        self.most_at_once = 0
        self.num_steps = 0
        self._tokens = 0
        self._started: dict[tuple[str, int], float] = {}
        self._live: dict[tuple[str, int], tuple[list[int], SamplingParams, int]] = {}

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None:
        if not prompt_token_ids or len(prompt_token_ids) >= self.max_model_len:
            raise InvalidRequestError("the prompt is empty or too long", "prompt_token_ids")
        if max(prompt_token_ids) >= self.vocab_size:
            raise InvalidRequestError("a token is not in the vocabulary", "prompt_token_ids")
        if len(self._live) >= self.max_queued:
            raise EngineOverloadedError("the queue is full")
        self.added.append(request_id)
        self.options[request_id] = options
        for index in range(params.n):
            self._live[request_id, index] = (list(prompt_token_ids), params, 0)
            self._started[request_id, index] = time.monotonic()
        self.most_at_once = max(self.most_at_once, len(self._live))

    def abort_request(self, request_id: str, index: int | None = None) -> list[TokenOutput]:
        self.aborted.append((request_id, index))
        for key in [key for key in self._live if key[0] == request_id and index in (None, key[1])]:
            del self._live[key]
        return []

    def has_unfinished_requests(self) -> bool:
        return bool(self._live)

    def step(self) -> list[TokenOutput]:
        self.num_steps += 1
        if self.num_steps == self.crash_at_step:
            raise RuntimeError("the cable was pulled")
        while self.hold.is_set():
            time.sleep(0.002)
        time.sleep(self.step_seconds)
        return [self._advance(key) for key in list(self._live)]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live), state_usage_fraction=0.25, prompt_tokens=7, generation_tokens=self._tokens
        )

    def _advance(self, key: tuple[str, int]) -> TokenOutput:
        prompt, params, position = self._live[key]
        script = prompt if self.script is None else [*self.script, self.eos_id]
        token_id = script[position % len(script)]
        self._tokens += 1
        reason = None
        if self.script is not None and position == len(self.script) and not params.ignore_eos:
            reason = "stop"
        elif params.max_tokens is not None and position + 1 >= params.max_tokens:
            reason = "length"
        self._live[key] = (prompt, params, position + 1)
        if reason:
            del self._live[key]
        logprobs = None
        if params.logprobs is not None:
            others = {token_id + rank: Logprob(math.log(0.5**rank), rank) for rank in range(2, 2 + params.logprobs)}
            logprobs = [{token_id: Logprob(math.log(0.5), 1)} | others]
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None and position == 0:
            prompt_logprobs = [None, *({token: Logprob(-1.0 - at, 1)} for at, token in enumerate(prompt[1:]))]
        return TokenOutput(
            request_id=key[0],
            index=key[1],
            token_ids=[token_id],
            logprobs=logprobs,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=reason,
            prompt_logprobs=prompt_logprobs,
            first_scheduled_time=self._started[key],
        )
