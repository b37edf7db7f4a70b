"""A draft model: a second, smaller program with the same vocabulary drafts for the sequences of the first.

It has states, pages and batches of its own. For each sequence it keeps a shadow: a `Sequence` with the same tokens,
whose states are caught up first and from there extended draft by draft, greedily. What it computed of drafts is undone
afterwards, whatever becomes of them: pages are written anew, slot states come back from a backup.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.errors import ConfigError
from autodeploy.ops.state import SlotState
from autodeploy.runtime.batch import BatchBuilder
from autodeploy.runtime.request import Limits, Sequence
from autodeploy.runtime.states import (
    StatePlan,
    allocate_states,
    bytes_per_sequence,
    copy_slot,
    memory_budget,
    plan_states,
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
    budget = memory_budget(options, program.device)
    own, drafts = (bytes_per_sequence(specs, options) for specs in (program.states, draft.states))
    draft_bytes = budget * drafts // max(1, own + drafts)
    limits = [limit for limit in (max_model_len, program.max_model_len, draft.max_model_len) if limit is not None]
    plan = plan_states(
        draft.states,
        replace(options, kv_cache_memory_bytes=draft_bytes, enable_prefix_caching=False),
        device=draft.device,
        max_model_len=None,
        model_limit=min(limits, default=None),
    )
    return DraftModel(draft, plan, options), replace(options, kv_cache_memory_bytes=budget - draft_bytes)


class DraftModel:
    """A `Proposer`.

    Args:
        program: the draft model.
        plan: its states, with backups.
        options: those of the engine.
    """

    def __init__(self, program: Program, plan: StatePlan, options: EngineOptions) -> None:
        self._program = program
        self._plan = plan
        self._limits = Limits(program.vocab_size, plan.max_model_len)
        self._budget = options.max_num_batched_tokens
        self._has_slots = any(isinstance(spec, SlotState) for spec in program.states)
        self._states = allocate_states(program.states, plan, program.device)
        self._allocator = plan.allocator()
        self._batches = BatchBuilder(
            program.batch_inputs(),
            page_tables=self._allocator.page_tables,
            page_size=plan.page_size,
            max_num_seqs=plan.num_slots - 1,
            max_num_batched_tokens=max(options.max_num_batched_tokens, plan.num_slots - 1),
            device=program.device,
        )
        self._shadows: dict[Sequence, Sequence] = {}

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts for the sequences that have grown and are caught up now; long ones take several calls for that."""
        shadows: dict[Sequence, int] = {}
        owners: dict[Sequence, Sequence] = {}
        for sequence, count in wanted.items():
            shadow = self._shadow(sequence)
            if shadow is not None:
                owners[shadow] = sequence
                shadows[shadow] = min(count, self._plan.max_model_len - len(shadow.token_ids))
        caught_up = self._catch_up(shadows)
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
        shadow.token_ids += sequence.token_ids[len(shadow.token_ids) :]
        return shadow

    def _catch_up(self, shadows: Mapping[Sequence, int]) -> dict[Sequence, int]:
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
        return self._run(scheduled)

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
            latest = self._run(growing)

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

    def _run(self, scheduled: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """Compute tokens; returns the most likely next token of each that has none left to compute."""
        if not scheduled:
            return {}
        batch = self._batches.build(scheduled)
        logits = self._program.run(batch.inputs, self._states)
        for shadow, count in scheduled.items():
            shadow.num_computed_tokens += count
        tokens = torch.argmax(logits[: len(batch.sampled)].float(), dim=-1).tolist()
        return dict(zip(batch.sampled, tokens, strict=True))

    def _copy_slot(self, source: int, target: int) -> None:
        if self._has_slots:
            copy_slot(self._program.states, self._states, source, target)
