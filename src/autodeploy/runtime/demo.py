"""The naive engine (`runtime=demollm`): the same requests in and tokens out, one sequence at a time.

To be read, and to check the real engine against. The whole prompt runs in one step, then one token per step; pages are
1, 2, 3, ... in order and nothing is shared, chunked, preempted or freed.
"""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from autodeploy.compile.program import Program, Progress
from autodeploy.config import EngineOptions
from autodeploy.errors import EngineDeadError, InvalidRequestError
from autodeploy.ops.batch_inputs import lookup
from autodeploy.ops.state import PagedState
from autodeploy.runtime.engine import UNUSABLE_LOGITS
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.request import (
    Limits,
    Request,
    RequestOptions,
    SamplingParams,
    Sequence,
    TokenOutput,
    new_sequences,
)
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.states import allocate_states, batch_limits, copy_slot, plan_states, reserved_bytes
from autodeploy.runtime.stats import EngineStats

SLOT = 1


class DemoEngine:
    """Interface and errors of `Engine`, without a limit to the queue. Sequences run in `order`, each to its end."""

    def __init__(
        self,
        program: Program,
        options: EngineOptions,
        max_model_len: int | None = None,
        grammars: GrammarCompiler | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        # Windows are a matter of the kernels; here every layer keeps all its pages, so there is one page table.
        self._specs = [replace(spec, window=None) if isinstance(spec, PagedState) else spec for spec in program.states]
        self.plan = plan_states(
            self._specs,
            replace(options, max_num_seqs=1, enable_prefix_caching=False),
            device=program.device,
            max_model_len=max_model_len,
            model_limit=program.max_model_len,
            reserved_bytes=reserved_bytes(program, replace(options, max_num_seqs=1), max_model_len),
        )
        self.program, self.options, self.max_model_len = program, options, self.plan.max_model_len
        self._limits = Limits(program.vocab_size, self.max_model_len, program.eos_token_ids)
        self._states = allocate_states(self._specs, self.plan, program.device)
        self._sampler = Sampler(options.seed, grammars, program.choose_tokens)
        program.prepare(self._states, batch_limits(options, 1, self.max_model_len), "text", progress)
        self._queue: list[Sequence] = []
        self._num_arrivals = self._num_steps = self._prompt_tokens = self._generation_tokens = 0
        self._model_seconds = 0.0

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None:
        if any(sequence.request.request_id == request_id for sequence in self._queue):
            raise InvalidRequestError(f"request id {request_id!r} is in use; give each request its own", "request_id")
        if params.prompt_logprobs is not None:
            raise InvalidRequestError("runtime=demollm gives no prompt_logprobs; use runtime=engine", "prompt_logprobs")
        request = Request(request_id, prompt_token_ids, params, self._num_arrivals, **options)
        sequences = new_sequences(request, self._limits)
        self._sampler.constraints.check(params)
        self._queue += sequences
        self._num_arrivals += 1

    def abort_request(self, request_id: str, index: int | None = None) -> list[TokenOutput]:
        chosen = [s for s in self._queue if s.request.request_id == request_id and index in (None, s.index)]
        for sequence in chosen:
            sequence.finish_reason = "abort"
            self._release(sequence)
        return [sequence.output([]) for sequence in chosen]

    def has_unfinished_requests(self) -> bool:
        return bool(self._queue)

    def step(self) -> list[TokenOutput]:
        if not self._queue:
            return []
        sequence = min(self._queue, key=lambda s: (s.num_computed_tokens == 0, s.order))
        began = time.perf_counter()
        try:
            if sequence.num_computed_tokens == 0:
                sequence.first_scheduled_time = time.monotonic()
                copy_slot(self._specs, self._states, 0, SLOT)
            logits = self.program.run(self._inputs(sequence), self._states)
            samples = self._sampler.sample(logits, [sequence])
        except Exception as error:
            self._queue.clear()  # states may be half written; a new request starts from fresh ones
            raise EngineDeadError(f"the engine stopped in a step: {type(error).__name__}: {error}") from error
        self._model_seconds = time.perf_counter() - began
        self._num_steps += 1
        sequence.num_computed_tokens = len(sequence.token_ids)
        token_id, logprobs = samples.token_ids[0], samples.logprobs[0]
        if token_id is None:
            why = self._sampler.constraints.problem(sequence, self._limits.vocab_size)
            sequence.finish_reason, sequence.stop_reason = "error", why or UNUSABLE_LOGITS
        else:
            self._prompt_tokens += 0 if sequence.num_output_tokens else sequence.num_prompt_tokens
            self._generation_tokens += 1
            sequence.append(token_id)
        if sequence.finish_reason is not None:
            self._release(sequence)
        return [sequence.output([] if token_id is None else [token_id], None if logprobs is None else [logprobs])]

    def stats(self) -> EngineStats:
        num_running = sum(sequence.num_computed_tokens > 0 for sequence in self._queue)
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._queue) - num_running,
            state_usage_fraction=float(num_running),
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            last_step_model_seconds=self._model_seconds,
        )

    def _inputs(self, sequence: Sequence) -> dict[str, Tensor]:
        start, end = sequence.num_computed_tokens, len(sequence.token_ids)
        positions = list(range(start, end))
        page_size = self.plan.page_size
        values: dict[str, list[int] | list[list[int]]] = {
            "input_ids": [sequence.token_ids[start:]],
            "position_ids": [positions],
            "cu_seqlens": [0, end - start],
            "seq_lens": [end],
            "logits_indices": [end - start - 1],
            "state_slots": [SLOT],
        }
        inputs = {}
        for name in self.program.batch_inputs():
            declared = lookup(name)
            if name.startswith("page_table_"):
                values[name] = [list(range(1, -(-end // page_size) + 1))]
            elif name.startswith("slot_mapping_"):
                values[name] = [page_size + position for position in positions]  # page 1 begins after scratch page 0
            inputs[name] = torch.tensor(
                values[name], dtype=declared.dtype if declared else None, device=self.program.device
            )
        return inputs

    def _release(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._sampler.release(sequence)
