"""A draft model: a second, smaller program with the same vocabulary drafts for the sequences of the first; or a draft
head does, a graph of the first program that reads the hidden states of the tokens it follows.

It has states, pages and batches of its own. For each sequence it keeps a shadow: a `Sequence` with the same tokens,
whose states are caught up first and from there extended draft by draft, greedily. What it computed of drafts is undone
afterwards, whatever becomes of them: pages are written anew, slot states come back from a backup.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.errors import ConfigError
from autodeploy.ops.batch_inputs import HIDDEN_STATES
from autodeploy.ops.state import SlotState, StateSpec
from autodeploy.runtime.batch import BatchBuilder
from autodeploy.runtime.request import Limits, Sequence
from autodeploy.runtime.states import (
    StatePlan,
    allocate_states,
    batch_limits,
    bytes_per_sequence,
    copy_slot,
    memory_budget,
    plan_states,
    reserved_bytes,
)


def draft_model_beside(
    program: Program, draft: Program, options: EngineOptions, max_model_len: int | None
) -> tuple["DraftModel", EngineOptions]:
    """A draft model for a program, and the program's options with the memory that the draft model leaves to it.

    Memory is shared as a sequence of both would take it.

    Raises:
        ConfigError: the vocabularies differ.
        OutOfMemoryError: the draft model's states do not fit.
    """
    if draft.vocab_size != program.vocab_size:
        raise ConfigError(
            f"the draft model has a vocabulary of {draft.vocab_size} tokens, the model one of {program.vocab_size}; "
            "speculative_config needs a draft model with the same vocabulary"
        )
    limits = [limit for limit in (max_model_len, program.max_model_len, draft.max_model_len) if limit is not None]
    length = min(limits, default=None)
    reserved = reserved_bytes(program, options, length) + reserved_bytes(draft, options, length)
    plan, options = _plan_beside(program, draft.states, options, length, reserved)
    return DraftModel(draft, plan, options), options


def plan_of_head(
    program: Program, options: EngineOptions, max_model_len: int | None
) -> tuple[StatePlan, EngineOptions]:
    """The states of a program's draft head, and the program's options with the memory that the head leaves to it.

    Raises:
        ConfigError: the program has no head.
        OutOfMemoryError: the head's states do not fit.
    """
    if program.head is None:
        raise ConfigError("speculative_config names a draft head, and the program was built without one; build it anew")
    limits = [limit for limit in (max_model_len, program.max_model_len) if limit is not None]
    length = min(limits, default=None)
    reserved = reserved_bytes(program, options, length) + reserved_bytes(program, options, length, "head")
    return _plan_beside(program, program.head.states, options, length, reserved)


def _plan_beside(
    program: Program,
    draft_states: SequenceOf[StateSpec],
    options: EngineOptions,
    max_model_len: int | None,
    reserved_bytes: int,
) -> tuple[StatePlan, EngineOptions]:
    """A plan for the states of who drafts, and the options with the memory that is left."""
    budget = memory_budget(options, program.device, reserved_bytes)
    own, drafts = (bytes_per_sequence(specs, options) for specs in (program.states, draft_states))
    draft_bytes = budget * drafts // max(1, own + drafts)
    plan = plan_states(
        draft_states,
        replace(options, kv_cache_memory_bytes=draft_bytes, enable_prefix_caching=False),
        device=program.device,
        max_model_len=None,
        model_limit=max_model_len,
    )
    return plan, replace(options, kv_cache_memory_bytes=budget - draft_bytes)


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states in pages.

    Attributes:
        state: `[pages, page_size, H]`.
        page_table: live, `[slots, pages]`.
    """

    state: Tensor
    page_table: NDArray[np.int32]

    def rows(self, spans: Iterable[tuple[int, int, int]]) -> Tensor:
        """Those of some tokens, `[1, T, H]`, given as (slot, first position, number of tokens)."""
        page_size = self.state.shape[1]
        places = []
        for slot, first, count in spans:
            positions = np.arange(first, first + count)
            places.append(
                self.page_table[slot, positions // page_size].astype(np.int64) * page_size + positions % page_size
            )
        indices = torch.from_numpy(np.concatenate(places)).to(self.state.device)
        return self.state.view(-1, self.state.shape[2]).index_select(0, indices)[None]


class DraftModel:
    """A `Proposer`.

    A head's shadow lacks the first token of its sequence: in the row of each token it reads the hidden state of the
    token before. That is the model's as long as the model has computed it, then the head's own.

    Args:
        program: the draft model, or the model itself with a head.
        plan: states of the draft model or head, with backups.
        options: those of the engine.
        hidden: of a head, the hidden states of the sequences to draft for.
    """

    def __init__(
        self, program: Program, plan: StatePlan, options: EngineOptions, hidden: HiddenStates | None = None
    ) -> None:
        self._program = program
        self._graph = "text" if hidden is None else "head"
        self._specs = program.states if program.head is None or hidden is None else program.head.states
        self._num_skipped = 0 if hidden is None else 1
        self._plan = plan
        self._limits = Limits(program.vocab_size, plan.max_model_len)
        self._budget = options.max_num_batched_tokens
        self._has_slots = any(isinstance(spec, SlotState) for spec in self._specs)
        self._states = allocate_states(self._specs, plan, program.device)
        self._allocator = plan.allocator()
        self._hidden = hidden
        self._own_hidden: HiddenStates | None = None
        if hidden is not None and program.head is not None:
            own = self._states[program.head.own_hidden_state]
            self._own_hidden = HiddenStates(own, self._allocator.page_tables["full"])
        self._batches = BatchBuilder(
            [name for name in program.batch_inputs(self._graph) if name != HIDDEN_STATES],
            page_tables=self._allocator.page_tables,
            page_size=plan.page_size,
            max_num_seqs=plan.num_slots - 1,
            max_num_batched_tokens=max(options.max_num_batched_tokens, plan.num_slots - 1),
            device=program.device,
        )
        self._shadows: dict[Sequence, Sequence] = {}
        limits = batch_limits(options, plan.num_slots - 1, plan.max_model_len)
        program.prepare(self._states, limits, self._graph)

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts for the sequences that have grown and are caught up now; long ones take several calls for that."""
        shadows: dict[Sequence, int] = {}
        owners: dict[Sequence, Sequence] = {}
        for sequence, count in wanted.items():
            shadow = self._shadow(sequence)
            if shadow is not None:
                owners[shadow] = sequence
                shadows[shadow] = min(count, self._plan.max_model_len - len(shadow.token_ids))
        caught_up = self._catch_up(shadows, owners)
        confirmed = {shadow: len(shadow.token_ids) for shadow in caught_up}
        for shadow in caught_up:
            self._copy_slot(shadow.slot, self._plan.backup_row(shadow.slot))
        self._extend(caught_up, shadows)
        proposed = {}
        for shadow, length in confirmed.items():
            proposed[owners[shadow]] = shadow.token_ids[length:]
            del shadow.token_ids[length:]
            shadow.num_computed_tokens = length
            self._copy_slot(self._plan.backup_row(shadow.slot), shadow.slot)
            self._allocator.release_unreachable(shadow)
        return proposed

    def release(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            self._allocator.free(shadow)

    def _shadow(self, sequence: Sequence) -> Sequence | None:
        """The sequence's shadow with all its tokens; None when they are too many for the draft model."""
        shadow = self._shadows.get(sequence)
        if len(sequence.token_ids) >= self._plan.max_model_len:
            self.release(sequence)
            return None
        if shadow is None:
            shadow = self._shadows[sequence] = Sequence(sequence.request, sequence.index, self._limits)
            shadow.token_ids.clear()
        shadow.token_ids += sequence.token_ids[self._num_skipped + len(shadow.token_ids) :]
        return shadow

    def _catch_up(self, shadows: Mapping[Sequence, int], owners: Mapping[Sequence, Sequence]) -> dict[Sequence, int]:
        """Compute the tokens that the states lack, within one step's budget; returns those that lack none, and the most
        likely next token of each.
        """
        scheduled: dict[Sequence, int] = {}
        budget = self._budget
        for shadow, num_drafts in shadows.items():
            count = min(budget, len(shadow.token_ids) - shadow.num_computed_tokens)
            if count > 0 and num_drafts > 0 and self._allocate(shadow, count):
                scheduled[shadow] = count
                budget -= count
        spans = [(owners[shadow].slot, shadow.num_computed_tokens, count) for shadow, count in scheduled.items()]
        return self._run(scheduled, self._hidden, spans)

    def _extend(self, latest: dict[Sequence, int], wanted: Mapping[Sequence, int]) -> None:
        """Append drafts, the `latest` ones first, as many as are wanted and find room."""
        num_drafts = 0
        while latest:
            num_drafts += 1
            growing = {}
            for shadow, token_id in latest.items():
                shadow.token_ids.append(token_id)
                if num_drafts < wanted[shadow] and self._allocator.allocate(shadow, 1):
                    growing[shadow] = 1
            spans = [(shadow.slot, shadow.num_computed_tokens - 1, 1) for shadow in growing]
            latest = self._run(growing, self._own_hidden, spans)

    def _allocate(self, shadow: Sequence, count: int) -> bool:
        """Room for `count` more tokens; without it the shadow gives back all it has, and starts anew some time."""
        is_new = not shadow.slot
        if not self._allocator.can_allocate(shadow, count):
            self._allocator.free(shadow)
            shadow.num_computed_tokens = 0
            return False
        self._allocator.allocate(shadow, count)
        if is_new:
            self._copy_slot(0, shadow.slot)
        return True

    def _run(
        self,
        scheduled: Mapping[Sequence, int],
        hidden: HiddenStates | None,
        spans: Iterable[tuple[int, int, int]],
    ) -> dict[Sequence, int]:
        """Compute tokens; returns the most likely next token of each that has none left to compute.

        Args:
            hidden, spans: for a head, where to read the hidden states of the tokens before.
        """
        if not scheduled:
            return {}
        batch = self._batches.build(scheduled)
        inputs = batch.inputs if hidden is None else batch.inputs | {HIDDEN_STATES: hidden.rows(spans)}
        logits = self._program.run(inputs, self._states, self._graph, batch.on_host)
        for shadow, count in scheduled.items():
            shadow.num_computed_tokens += count
        tokens = torch.argmax(logits[: len(batch.sampled)].float(), dim=-1).tolist()
        return dict(zip(batch.sampled, tokens, strict=True))

    def _copy_slot(self, source: int, target: int) -> None:
        if self._has_slots:
            copy_slot(self._specs, self._states, source, target)
