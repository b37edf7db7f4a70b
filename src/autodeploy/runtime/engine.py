"""The engine: requests as token ids go in, sampled tokens come out, one step at a time.

A step is: schedule, build the batch, run the model, choose tokens, read them, commit. A device that works behind the
host's back is kept busy by leaving a step *in flight*: the next one is scheduled, built and launched before its tokens
are read. They stay on the device, where the next step takes them from; a sequence that they turn out to end gives its
pages back then, and what the next step computes of it is thrown away. Where the next step needs them on the host, or
needs the room of a sequence that they may end, they are read first.
"""

import heapq
import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from typing import Unpack

from autodeploy.compile.program import Program, Progress
from autodeploy.config import EngineOptions, Options, SpeculativeOptions, check_options
from autodeploy.errors import ConfigError, EngineDeadError, EngineOverloadedError, InvalidRequestError
from autodeploy.ops.sampling import accept_drafts
from autodeploy.ops.state import SlotState
from autodeploy.runtime.batch import Batch, BatchBuilder
from autodeploy.runtime.draft_model import DraftModel, HiddenStates, draft_model_beside, plan_of_head
from autodeploy.runtime.flight import Flight, launch
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.logprobs import note_prompt_logprobs
from autodeploy.runtime.prefix_cache import PrefixCache
from autodeploy.runtime.request import (
    FinishReason,
    Limits,
    Logprob,
    Request,
    RequestOptions,
    SamplingParams,
    Sequence,
    TokenOutput,
    new_sequences,
)
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.scheduler import ScheduledStep, Scheduler
from autodeploy.runtime.speculative import NgramProposer, Proposer, may_speculate
from autodeploy.runtime.states import (
    StatePlan,
    allocate_states,
    batch_limits,
    copy_slot,
    plan_states,
    reserved_bytes,
)
from autodeploy.runtime.stats import EngineStats
from autodeploy.runtime.verify import Extension, extend_by_choice, extend_sequences

logger = logging.getLogger(__name__)

UNUSABLE_LOGITS = "no token can be sampled: the model returned logits that are not numbers; check dtype and weights"


class Engine:
    """Serves many requests at once. All methods are to be called from one thread.

    Args:
        program: the model.
        options: scheduling and memory.
        max_model_len: context limit in tokens, prompt and output together; it fits the memory or is refused. By default
            the program's own limit, or as much of it as fits.
        grammars: compiles what guided requests follow; None refuses them.
        successor: a program of the same model that takes over between two steps, when there is one; what runs then is
            computed anew. One that failed is reported once, and `program` goes on.
        draft: the draft model, when `speculative_config` names one.
        clock: seconds, never going back; for the timeouts of requests.
        progress: called with one line when getting ready takes a while.
    Raises:
        ConfigError: an option with a bad value.
        OutOfMemoryError: the states of one sequence do not fit.
    """

    def __init__(
        self,
        program: Program,
        options: EngineOptions,
        max_model_len: int | None = None,
        successor: Future[Program] | None = None,
        grammars: GrammarCompiler | None = None,
        *,
        draft: Program | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: Progress | None = None,
    ) -> None:
        check_options(Options(engine=options))
        self._successor = successor
        self._requests: dict[str, list[Sequence]] = {}
        """sequences of each request that are not finished"""
        self._deadlines: list[tuple[float, int, Request]] = []
        """of requests that have one, as a heap; finished ones are dropped when their time comes"""
        self._clock = clock
        self._failure: Exception | None = None
        self._num_arrivals = self._num_steps = self._num_overlapped_steps = self._num_preemptions = 0
        self._prompt_tokens = self._generation_tokens = self._queried_tokens = self._hit_tokens = 0
        self._num_drafts = self._draft_tokens = self._accepted_tokens = 0
        self._host_seconds = self._model_seconds = 0.0
        self._speculation = SpeculativeOptions.of(options.speculative_config)
        self._proposer: Proposer | None = None
        head_plan: StatePlan | None = None
        if self._speculation is not None and self._speculation.method == "ngram":
            self._proposer = NgramProposer(self._speculation)
        elif self._speculation is not None and self._speculation.uses_head:
            head_plan, options = plan_of_head(program, options, max_model_len)
        elif self._speculation is not None:
            if draft is None:
                raise ConfigError(
                    "speculative_config names a draft model, and the engine was given none; pass draft=..."
                )
            self._proposer, options = draft_model_beside(program, draft, options, max_model_len)
        self._flight: Flight | None = None
        is_asynchronous = options.async_scheduling
        if is_asynchronous is None:
            is_asynchronous = program.device.type == "cuda"
        self._overlaps = is_asynchronous and self._speculation is None
        self._sampler = Sampler(options.seed, grammars)
        self._run_with(program, options, max_model_len, progress)
        if head_plan is not None and program.head is not None:
            kept = self._states[program.head.hidden_state]
            hidden = HiddenStates(kept, self._allocator.page_tables["full"])
            self._proposer = DraftModel(program, head_plan, options, hidden)

    def _run_with(
        self, program: Program, options: EngineOptions, max_model_len: int | None, progress: Progress | None = None
    ) -> None:
        """Plan and allocate the states of a program, and all that works with them."""
        plan = plan_states(
            program.states,
            options,
            device=program.device,
            max_model_len=max_model_len,
            model_limit=program.max_model_len,
            reserved_bytes=reserved_bytes(program, options, max_model_len),
        )
        self.program = program
        self._sampler.choose_tokens = program.choose_tokens
        self._sampler.accept_drafts = program.accept_drafts or accept_drafts.reference
        self.options = options
        self.plan = plan
        self.max_model_len = plan.max_model_len
        self._limits = Limits(program.vocab_size, self.max_model_len, program.eos_token_ids)
        self._states = allocate_states(program.states, plan, program.device)
        self._allocator = plan.allocator()
        self._has_slots = any(isinstance(spec, SlotState) for spec in program.states)
        self._prefixes = PrefixCache(
            self._allocator,
            snapshot_rows=range(plan.num_slots, plan.num_slots + plan.num_snapshots) if self._has_slots else None,
            is_enabled=options.enable_prefix_caching,
        )
        self._scheduler = Scheduler(
            self._allocator, self._prefixes, max_num_batched_tokens=options.max_num_batched_tokens
        )
        self._batches = BatchBuilder(
            program.batch_inputs(),
            page_tables=self._allocator.page_tables,
            page_size=plan.page_size,
            max_num_seqs=plan.num_slots - 1,
            max_num_batched_tokens=options.max_num_batched_tokens,
            device=program.device,
        )
        program.prepare(self._states, batch_limits(options, plan.num_slots - 1, plan.max_model_len), "text", progress)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None:
        """Queue a request. Its tokens come out of `step`.

        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served, or an id already in use.
            EngineOverloadedError: `max_queued_requests` sequences are waiting already.
            EngineDeadError: the engine has stopped.
        """
        self._check_alive()
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use; give each request its own", "request_id")
        request = Request(request_id, prompt_token_ids, params, self._num_arrivals, **options)
        sequences = new_sequences(request, self._limits)
        self._sampler.constraints.check(params)
        if not self._allocator.can_ever_fit(len(prompt_token_ids) + 1):
            raise InvalidRequestError(
                f"the prompt has {len(prompt_token_ids)} tokens, more than the state memory holds; shorten it or raise "
                "kv_cache_memory_bytes",
                "prompt_token_ids",
            )
        if self._scheduler.num_waiting >= self.options.max_queued_requests:
            raise EngineOverloadedError(
                f"{self._scheduler.num_waiting} sequences are waiting and max_queued_requests is "
                f"{self.options.max_queued_requests}; try again later"
            )
        self._num_arrivals += 1
        self._requests[request_id] = sequences
        first, *siblings = sequences
        self._scheduler.add(first)
        for sequence in siblings:
            self._scheduler.add(sequence, behind=first)
        if request.timeout_seconds is not None:
            heapq.heappush(self._deadlines, (self._clock() + request.timeout_seconds, request.arrival, request))

    def abort_request(self, request_id: str, index: int | None = None) -> list[TokenOutput]:
        """Stop a request, or its sequence `index`, and free what it owns. `step` says no more of it.

        Returns one output with `finish_reason="abort"` for each sequence stopped; none for an unknown or finished one.
        """
        chosen = [s for s in self._requests.get(request_id, ()) if index is None or s.index == index]
        return [self._finish(sequence, "abort") for sequence in chosen]

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[TokenOutput]:
        """Run one batch and return what it added to each sequence; no-op without unfinished requests.

        Raises:
            EngineDeadError: the model failed, now or in an earlier step; `__cause__` carries the reason. All requests
                are lost and the engine takes no more.
        """
        self._check_alive()
        try:
            return self._step()
        except Exception as error:
            self._failure = error
            raise EngineDeadError(f"the engine stopped in a step: {type(error).__name__}: {error}") from error

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_preemptions=self._num_preemptions + self._scheduler.num_preemptions,
            state_usage_fraction=self._allocator.usage_fraction,
            num_steps=self._num_steps,
            num_overlapped_steps=self._num_overlapped_steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queried_tokens=self._queried_tokens + self._prefixes.num_queried_tokens,
            prefix_cache_hit_tokens=self._hit_tokens + self._prefixes.num_hit_tokens,
            num_drafts=self._num_drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted_tokens,
            last_step_host_seconds=self._host_seconds,
            last_step_model_seconds=self._model_seconds,
        )

    def _step(self) -> list[TokenOutput]:
        began = time.perf_counter()
        self._model_seconds = 0.0
        outputs = self._between_steps()
        step = self._schedule(outputs)
        if step.scheduled:
            flight = self._launch(step)
            outputs += self._land()
            if self._may_stay_in_flight(flight.batch):
                self._flight = flight
                for row, sequence in enumerate(flight.batch.sampled):
                    sequence.pending_row = row
                self._commit(step.scheduled)
            elif flight.batch.has_drafts:
                extensions = self._read_drafted(flight)
                self._commit(self._undo_rejected(step.scheduled, extensions))
                outputs += [self._output(e.sequence, e.token_ids, e.logprobs, e.is_usable) for e in extensions]
            else:
                self._commit(step.scheduled)
                outputs += self._read(flight)
            self._num_steps += 1
        else:
            outputs += self._land()
        self._host_seconds = time.perf_counter() - began - self._model_seconds
        return outputs

    def _between_steps(self) -> list[TokenOutput]:
        """What is done when a time has come: go on with the successor, end the requests whose time is up."""
        outputs: list[TokenOutput] = []
        if self._successor is not None and self._successor.done():
            outputs += self._land()
            self._adopt(self._successor)
        now = self._clock() if self._deadlines else 0.0
        if self._deadlines and self._deadlines[0][0] <= now:
            outputs += self._land()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            unfinished = [s for s in self._requests.get(request.request_id, ()) if s.request is request]
            why = f"the request's timeout of {request.timeout_seconds:g} seconds is over"
            outputs += [self._finish(sequence, "timeout", why) for sequence in unfinished]
        return outputs

    def _schedule(self, outputs: list[TokenOutput]) -> ScheduledStep:
        """The next step. Reads the tokens of the one in flight first if there is no room without those they end."""
        step = None
        if self._flight is not None:
            step = self._scheduler.schedule_behind()
            if step is None:
                outputs += self._land()
        if step is None:
            self._draft()
            step = self._scheduler.schedule()
        outputs += [self._finish(sequence, "error", sequence.stop_reason) for sequence in step.failed]
        for sequence, row in step.admitted.items():
            self._copy_slot(row, sequence.slot)
            if sequence.first_scheduled_time is None:
                sequence.first_scheduled_time = self._clock()
        return step

    def _launch(self, step: ScheduledStep) -> Flight:
        """Build the batch, run the model and choose tokens, as far as that goes without waiting for the device."""
        latest_R = None if self._flight is None else self._flight.latest_R
        self._num_overlapped_steps += self._flight is not None
        batch = self._batches.build(step.scheduled, latest_R)
        if batch.has_drafts and self._has_slots:
            for sequence in batch.sampled:
                if sequence.draft_token_ids:
                    self._copy_slot(sequence.slot, self.plan.backup_row(sequence.slot))
        began = time.perf_counter()
        flight = launch(self.program, self._states, self._sampler, batch, latest_R)
        self._model_seconds += time.perf_counter() - began
        return flight

    def _may_stay_in_flight(self, batch: Batch) -> bool:
        """Whether the next step can do without this one's tokens, as far as that is known now."""
        if not self._overlaps or batch.prompt_rows:
            return False
        return not any(sequence.waits_for_tokens for sequence in batch.sampled)

    def _land(self) -> list[TokenOutput]:
        """Read the tokens of the step in flight, which is committed already; no-op when there is none."""
        flight, self._flight = self._flight, None
        return [] if flight is None else self._read(flight)

    def _read(self, flight: Flight) -> list[TokenOutput]:
        """Append the tokens of a step without drafts, which is committed already, to the sequences that go on still."""
        choice, batch = flight.choice, flight.batch
        if choice is None:
            raise ValueError("a step without drafts whose tokens were not chosen")
        began = time.perf_counter()
        samples = choice.read()
        note_prompt_logprobs(batch, flight.logits_RV)
        self._model_seconds += time.perf_counter() - began
        outputs = []
        for sequence, token_id, logprobs in zip(batch.sampled, samples.token_ids, samples.logprobs, strict=True):
            sequence.pending_row = None
            if sequence.finish_reason is not None:
                continue
            if token_id is not None:
                sequence.append(token_id)
            token_ids = [] if token_id is None else [token_id]
            entries = None if logprobs is None else [logprobs]
            outputs.append(self._output(sequence, token_ids, entries, token_id is not None))
        return outputs

    def _read_drafted(self, flight: Flight) -> list[Extension]:
        """Append the tokens of a step with drafts to its sequences."""
        began = time.perf_counter()
        batch, choice, logits_RV = flight.batch, flight.choice, flight.logits_RV
        if choice is not None and choice.accepted_S is not None:
            extensions = extend_by_choice(choice, choice.accepted_S, batch.sampled)
        elif logits_RV is None:
            raise ValueError("a step with drafts that kept neither tokens nor logits")
        else:
            extensions = extend_sequences(self._sampler, logits_RV[: batch.num_sampled_rows], batch)
        note_prompt_logprobs(batch, logits_RV)
        self._model_seconds += time.perf_counter() - began
        return extensions

    def _adopt(self, successor: Future[Program]) -> None:
        """Go on with the successor. Sequences keep their tokens and wait again; their states are computed anew."""
        self._successor = None
        reason = successor.exception()
        if reason is not None:
            logger.error("%s; serving goes on with the model's own code", reason)
            self.program.report.facts["successor"] = str(reason)
            return
        unfinished = list(self._scheduler.sequences())
        self._num_preemptions += self._scheduler.num_preemptions
        self._queried_tokens += self._prefixes.num_queried_tokens
        self._hit_tokens += self._prefixes.num_hit_tokens
        for sequence in unfinished:
            self._allocator.free(sequence)
            sequence.num_computed_tokens = 0
            sequence.draft_token_ids = []
        self._states = {}  # given back before new ones are allocated, within the same budget
        options = replace(self.options, kv_cache_memory_bytes=self.plan.num_bytes)
        self._run_with(successor.result(), options, self.max_model_len)
        for sequence in unfinished:
            self._scheduler.add(sequence)

    def _draft(self) -> None:
        """Give decoding sequences drafts of what may come next, as far as they may still grow."""
        if self._proposer is None or self._speculation is None:
            return
        most = self._speculation.num_speculative_tokens
        wanted = {
            sequence: count
            for sequence in self._scheduler.running
            # one more token comes behind the last draft
            if may_speculate(sequence) and (count := min(most, sequence.max_length - len(sequence.token_ids) - 1)) > 0
        }
        for sequence, drafts in self._proposer.propose(wanted).items():
            sequence.draft_token_ids = drafts

    def _undo_rejected(
        self, scheduled: Mapping[Sequence, int], extensions: SequenceOf[Extension]
    ) -> Mapping[Sequence, int]:
        """How many tokens to commit after a step with drafts. Of those that were rejected, slot states are undone and
        pages written anew.
        """
        num_tokens = dict(scheduled)
        for extension in extensions:
            sequence = extension.sequence
            num_drafts = len(sequence.draft_token_ids)
            if num_drafts == 0:
                continue
            self._num_drafts += 1
            self._draft_tokens += num_drafts
            self._accepted_tokens += extension.num_accepted
            sequence.draft_token_ids = []
            if extension.num_accepted == num_drafts:
                continue
            if self._has_slots:
                self._copy_slot(self.plan.backup_row(sequence.slot), sequence.slot)
                del num_tokens[sequence]
            else:
                num_tokens[sequence] = 1 + extension.num_accepted
        return num_tokens

    def _commit(self, num_tokens: Mapping[Sequence, int]) -> None:
        """Record what is in memory, or will be when the next step runs."""
        for sequence, row in self._scheduler.commit(num_tokens).items():
            self._copy_slot(sequence.slot, row)

    def _output(
        self, sequence: Sequence, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None, is_usable: bool
    ) -> TokenOutput:
        """Count what a sequence got, end it if that is due or if no token could follow, and say so."""
        self._generation_tokens += len(token_ids)
        if token_ids and len(sequence.token_ids) - len(token_ids) == sequence.num_prompt_tokens:
            self._prompt_tokens += sequence.num_prompt_tokens
        if not is_usable:
            sequence.finish_reason = "error"
            why = self._sampler.constraints.problem(sequence, self._limits.vocab_size)
            sequence.stop_reason = why or UNUSABLE_LOGITS
        if sequence.finish_reason is not None:
            self._release(sequence)
        return sequence.output(token_ids, logprobs or None)

    def _copy_slot(self, source: int, target: int) -> None:
        copy_slot(self.program.states, self._states, source, target)

    def _finish(self, sequence: Sequence, reason: FinishReason, why: int | str | None = None) -> TokenOutput:
        """End a sequence without a new token."""
        sequence.finish_reason, sequence.stop_reason = reason, why
        self._release(sequence)
        return sequence.output([])

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._sampler.release(sequence)
        if self._proposer is not None:
            self._proposer.release(sequence)
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError("the engine has stopped; start a new one") from self._failure
