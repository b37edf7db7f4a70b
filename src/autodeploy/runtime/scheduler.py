"""Continuous batching: running and waiting sequences go in, the sequences and token counts of one step come out.

One order rules everything: (priority, arrival, index), see `Sequence.order`. Within the token budget of a step, running
sequences that decode come first, then those still in their prompt, then waiting ones, each in order. Long prompts are
cut into chunks by what the budget leaves. A sequence starts behind the longest prefix that is known.

When pages run out, the last running sequence gives up all it owns and waits again; of that it finds again, as a known
prefix, what nobody has overwritten, and the rest is recomputed. Nobody overtakes the first waiting sequence, and the
first running sequence is never preempted for another, so every sequence finishes.

Drafts are computed behind the one token of a decoding sequence where budget and pages are plenty, else dropped.
"""

import heapq
from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from autodeploy.runtime.pages import StateAllocator
from autodeploy.runtime.prefix_cache import PrefixCache
from autodeploy.runtime.request import Sequence, Status


@dataclass
class ScheduledStep:
    """What one step does.

    Attributes:
        scheduled: tokens to compute now, per sequence, drafts included; they follow its `num_computed_tokens`.
        admitted: sequences that start in this step, and the row that their slot states are copied from; 0: they start
            from zero.
        preempted: sequences that lost their states and wait again.
        failed: sequences that cannot fit even alone; already finished.
    """

    scheduled: dict[Sequence, int] = field(default_factory=dict)
    admitted: dict[Sequence, int] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Decides what runs. `schedule` allocates; `commit` and `finish` release."""

    def __init__(self, allocator: StateAllocator, prefixes: PrefixCache, *, max_num_batched_tokens: int) -> None:
        self.running: list[Sequence] = []
        """always sorted by `order`"""
        self.num_preemptions = 0
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._held: dict[Sequence, list[Sequence]] = {}
        """by a sequence that computes their prompt, those that wait for it"""
        self._allocator = allocator
        self._prefixes = prefixes
        self._max_num_batched_tokens = max_num_batched_tokens

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._held.values()))

    def sequences(self) -> Iterator[Sequence]:
        """All sequences that are not finished, in no particular order."""
        yield from self.running
        yield from (sequence for _, sequence in self._waiting)
        for held in self._held.values():
            yield from held

    def add(self, sequence: Sequence, *, behind: Sequence | None = None) -> None:
        """Queue a sequence. It waits in `order`, wherever it comes from.

        Args:
            behind: a sequence with the same prompt, not finished: this one starts when that one's prompt is known.
        """
        sequence.status = Status.WAITING
        if behind is not None and self._prefixes.can_share(sequence):
            self._held.setdefault(behind, []).append(sequence)
        else:
            heapq.heappush(self._waiting, (sequence.order, sequence))

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and free what it owns."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
            for held in self._held.values():
                if sequence in held:
                    held.remove(sequence)
        self._allocator.free(sequence)
        sequence.status = Status.FINISHED
        self._release_held(sequence)

    def schedule(self) -> ScheduledStep:
        """The next step; empty when there is nothing to run."""
        step = ScheduledStep()
        self._fill(step, may_preempt=True)
        return step

    def schedule_behind(self) -> ScheduledStep | None:
        """The next step while tokens of the last one are being sampled; None where a running sequence finds no room.

        Nobody is preempted or fails for want of pages that these tokens may set free.
        """
        step = ScheduledStep()
        return step if self._fill(step, may_preempt=False) else None

    def _fill(self, step: ScheduledStep, *, may_preempt: bool) -> bool:
        """Schedule what there is to run. Returns False, with nobody admitted, when it would have to preempt."""
        budget = self._max_num_batched_tokens
        room_tokens = self._allocator.room_tokens
        for sequence, wanted in self._in_service_order():
            if budget == 0:
                break
            # Most steps of most sequences need no page: they cost no calls.
            has_room = sequence.num_computed_tokens < room_tokens[sequence.slot]
            if wanted == 1 and has_room and not sequence.draft_token_ids:
                step.scheduled[sequence] = 1
                budget -= 1
                continue
            granted = self._grant(sequence, wanted, budget, step)
            while not granted and sequence.status is Status.RUNNING:
                if not may_preempt:
                    return False
                budget += self._make_room(sequence, step)
                granted = self._grant(sequence, wanted, budget, step)
            budget -= granted
        while budget > 0 and self._waiting and not step.preempted:
            sequence = self._waiting[0][1]
            if not self._admit(sequence, step):
                break
            budget -= self._grant(sequence, len(sequence.token_ids) - sequence.num_computed_tokens, budget, step)
        return True

    def commit(self, num_tokens: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """Record that the states of so many more tokens of each sequence are in memory; of one that ended, nothing.

        Returns the rows that slot states are to be copied to before the next step, of sequences that have one.
        """
        rows: dict[Sequence, int] = {}
        page_size, has_windows = self._allocator.page_size, self._allocator.has_windows
        for sequence, count in num_tokens.items():
            if not sequence.slot:
                continue
            before = sequence.num_computed_tokens
            now = sequence.num_computed_tokens = before + count
            # Most steps of most sequences fill no page: they cost no calls.
            if before % page_size + count >= page_size:
                row = self._prefixes.publish(sequence, before)
                if row:
                    rows[sequence] = row
            if has_windows:
                self._allocator.release_unreachable(sequence)
            if self._held and now >= sequence.num_prompt_tokens:
                self._release_held(sequence)
        return rows

    def _release_held(self, sequence: Sequence) -> None:
        for held in self._held.pop(sequence, ()):
            self.add(held)

    def _admit(self, sequence: Sequence, step: ScheduledStep) -> bool:
        """Start the first waiting sequence, behind the longest known prefix; or fail it, when it cannot fit alone.

        Returns False when it has to wait on.
        """
        if not self._allocator.has_free_slot:
            return False
        prefix = self._prefixes.find(sequence)
        if not self._allocator.can_admit(sequence, prefix, num_reserved_pages=len(self.running)):
            if not self.running:
                self._fail(sequence, step)
            return not self.running
        heapq.heappop(self._waiting)
        self._allocator.adopt(sequence, prefix)
        self._prefixes.start(sequence, prefix)
        sequence.num_computed_tokens = prefix.num_tokens
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda running: running.order)
        step.admitted[sequence] = prefix.snapshot
        return True

    def _in_service_order(self) -> list[tuple[Sequence, int]]:
        """Running sequences, and how many of their tokens are not computed yet."""
        decoding: list[tuple[Sequence, int]] = []
        prefilling: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            num_tokens = len(sequence.token_ids) + (sequence.pending_row is not None)  # `num_tokens`, without a call
            if num_tokens >= sequence.max_length:
                continue  # its last token is being sampled
            wanted = num_tokens - sequence.num_computed_tokens
            (decoding if wanted == 1 else prefilling).append((sequence, wanted))
        return decoding + prefilling

    def _grant(self, sequence: Sequence, wanted: int, budget: int, step: ScheduledStep) -> int:
        """Allocate the sequence's next tokens, as many as the budget and the pages allow."""
        if sequence.status is not Status.RUNNING:  # failed, or preempted for an earlier one in this very step
            return 0
        if wanted > budget:
            wanted = budget
        if self._prefixes.has_snapshots:
            wanted = self._prefixes.limit_chunk(sequence, wanted)
        granted = self._allocator.allocate(sequence, wanted)
        if granted and sequence.draft_token_ids:
            granted += self._grant_drafts(sequence, budget - granted)
        if granted:
            step.scheduled[sequence] = granted
        return granted

    def _grant_drafts(self, sequence: Sequence, budget: int) -> int:
        """Keep as many drafts as are for free: the others lose neither the budget for a token nor a page by them."""
        num_drafts = max(0, min(len(sequence.draft_token_ids), budget - len(self.running)))
        if not self._allocator.has_free_pages(len(self.running)):
            num_drafts = 0
        elif num_drafts:
            num_drafts = self._allocator.allocate(sequence, 1 + num_drafts) - 1
        del sequence.draft_token_ids[num_drafts:]
        return num_drafts

    def _make_room(self, sequence: Sequence, step: ScheduledStep) -> int:
        """Preempt the last running sequence, maybe `sequence` itself; returns how many tokens of this step that undid.

        Alone and still without room, `sequence` can never fit and fails.
        """
        if len(self.running) == 1:
            self._fail(sequence, step)
            return 0
        victim = self.running.pop()
        self._allocator.free(victim)
        victim.num_computed_tokens = 0
        victim.draft_token_ids = []
        self.num_preemptions += 1
        self.add(victim)
        step.preempted.append(victim)
        return step.scheduled.pop(victim, 0)

    def _fail(self, sequence: Sequence, step: ScheduledStep) -> None:
        self.finish(sequence)
        sequence.finish_reason = "error"
        sequence.stop_reason = (
            f"a sequence of {len(sequence.token_ids)} tokens does not fit the state memory even alone; "
            "raise kv_cache_memory_bytes or memory_fraction"
        )
        step.failed.append(sequence)
