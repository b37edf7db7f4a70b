"""Page and slot bookkeeping: sequences go in, page tables and slots come out (no torch).

A slot is a sequence's row: in every page table here, and in every slot state on the device. Each group of paged states
has a pool of pages and one page table. Page 0 and slot 0 are scratch and never handed out.

Invariants, at any time and for every group:
  - a page is free or owned by exactly one sequence; free + used = num_pages - 1;
  - a sequence owns the pages of all positions that its future queries can see, and no others after
    `release_unreachable`;
  - table entries of pages not owned (freed, unused, or of a free slot) are 0.

Ownership changes in `PagePool.take` and `PagePool.give` only. That is where reference counts for shared prefixes go.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autodeploy.runtime.request import Sequence


@dataclass(frozen=True, kw_only=True)
class PageGroup:
    """Geometry of one group of paged states.

    Attributes:
        name: group name of the state specs, e.g. `full` or `window_512`.
        num_pages: pages in memory, scratch page 0 included.
        window: tokens a query can look back on, itself included; None means all.
    """

    name: str
    num_pages: int
    window: int | None = None

    def max_pages(self, num_tokens: int, page_size: int) -> int:
        """Pages that a sequence growing to `num_tokens` needs at once, when it is computed token by token."""
        num_pages = -(-num_tokens // page_size)
        # A window that starts within a page spans one page more than its tokens fill.
        return num_pages if self.window is None else min(num_pages, (self.window - 2) // page_size + 2)


class PagePool:
    """The pages of one group that nobody owns. Pages freed longest ago are handed out first."""

    def __init__(self, num_pages: int) -> None:
        self.num_usable = num_pages - 1
        self._free = deque(range(1, num_pages))
        self._is_free = bytearray([0] + [1] * self.num_usable)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, now owned by the caller. Raises RuntimeError when there are not enough."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages taken from a pool with {len(self._free)} free ones")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """Take pages back from their owner. Raises RuntimeError for a page that nobody owns."""
        for page in pages:
            if page == 0 or self._is_free[page]:
                raise RuntimeError(f"page {page} given back, but nobody owns it")
            self._is_free[page] = 1
            self._free.append(page)


class GroupTable:
    """Page pool and page table of one group."""

    def __init__(self, group: PageGroup, *, num_slots: int, page_size: int, max_model_len: int) -> None:
        self.group = group
        self.pool = PagePool(group.num_pages)
        self.page_size = page_size
        self.max_entries = -(-max_model_len // page_size)
        self.table: NDArray[np.int32] = np.zeros((num_slots, self.max_entries), dtype=np.int32)
        self.num_entries = [0] * num_slots
        """per slot, leading table entries in use, freed ones included"""
        self.num_freed = [0] * num_slots
        """per slot, leading table entries already given back"""

    def num_fitting_tokens(self, sequence: Sequence) -> int:
        """How many tokens the sequence can grow by, with the pages it holds and the free ones."""
        num_pages = min(self.num_entries[sequence.slot] + self.pool.num_free, self.max_entries)
        return num_pages * self.page_size - sequence.num_computed_tokens

    def extend(self, slot: int, num_tokens: int) -> None:
        """Own pages for the first `num_tokens` tokens (those already freed excepted)."""
        have, need = self.num_entries[slot], -(-num_tokens // self.page_size)
        if need > have:
            self.table[slot, have:need] = self.pool.take(need - have)
            self.num_entries[slot] = need

    def free_before(self, slot: int, num_entries: int) -> None:
        """Give back the pages of the first `num_entries` table entries and zero the entries."""
        first = self.num_freed[slot]
        end = min(num_entries, self.num_entries[slot])
        if end > first:
            self.pool.give(self.table[slot, first:end].tolist())
            self.table[slot, first:end] = 0
            self.num_freed[slot] = end

    def free_all(self, slot: int) -> None:
        self.free_before(slot, self.num_entries[slot])
        self.num_entries[slot] = self.num_freed[slot] = 0


class StateAllocator:
    """Pages of every group and one slot for each running sequence.

    Side effects: sets `Sequence.slot`; reads `Sequence.num_computed_tokens` and changes it never.
    """

    def __init__(self, groups: Iterable[PageGroup], *, num_slots: int, page_size: int, max_model_len: int) -> None:
        self.page_size = page_size
        self.groups = {
            group.name: GroupTable(group, num_slots=num_slots, page_size=page_size, max_model_len=max_model_len)
            for group in groups
        }
        self._tables = tuple(self.groups.values())
        self._windowed = [(table, table.group.window) for table in self._tables if table.group.window is not None]
        self._free_slots = deque(range(1, num_slots))
        self._num_usable_slots = num_slots - 1

    @property
    def page_tables(self) -> dict[str, NDArray[np.int32]]:
        """Live page tables `[num_slots, pages]` by group name; a sequence's row is its slot."""
        return {name: table.table for name, table in self.groups.items()}

    @property
    def usage_fraction(self) -> float:
        """Share of pages in use in the fullest group, or of slots when that is more."""
        used = [1 - table.pool.num_free / max(1, table.pool.num_usable) for table in self._tables]
        return max([1 - len(self._free_slots) / max(1, self._num_usable_slots), *used])

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether the paged states of one sequence this long fit when nothing else runs."""
        return all(table.group.max_pages(num_tokens, self.page_size) <= table.pool.num_usable for table in self._tables)

    def can_admit(self, sequence: Sequence, *, num_reserved_pages: int) -> bool:
        """Whether all tokens of a waiting sequence fit beside `num_reserved_pages` kept free per group.

        The whole sequence counts, not its first chunk: one admitted on a promise of pages that are not there would be
        preempted soon after, and its work lost.
        """
        if not self._free_slots:
            return False
        num_tokens = len(sequence.token_ids)
        return all(
            table.group.max_pages(num_tokens, self.page_size) + num_reserved_pages <= table.pool.num_free
            for table in self._tables
        )

    def can_allocate(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Whether `allocate` would grant all of them."""
        has_slot = bool(sequence.slot or self._free_slots)
        return has_slot and all(table.num_fitting_tokens(sequence) >= num_new_tokens for table in self._tables)

    def allocate(self, sequence: Sequence, num_new_tokens: int) -> int:
        """Own a slot, and pages for up to `num_new_tokens` tokens after `num_computed_tokens`.

        Returns how many tokens got their pages: fewer when pages run short, 0 (and nothing changed) when none did.
        """
        granted = num_new_tokens
        end = sequence.num_computed_tokens + num_new_tokens
        for table in self._tables:
            if end > table.num_entries[sequence.slot] * self.page_size:
                granted = min(granted, table.num_fitting_tokens(sequence))
        if granted <= 0 or not (sequence.slot or self._free_slots):
            return 0
        if not sequence.slot:
            sequence.slot = self._free_slots.popleft()
        end = sequence.num_computed_tokens + granted
        for table in self._tables:
            if end > table.num_entries[sequence.slot] * self.page_size:
                table.extend(sequence.slot, end)
        return granted

    def release_unreachable(self, sequence: Sequence) -> None:
        """Give back pages that lie wholly before the window of every query still to come."""
        for table, window in self._windowed:
            num_unreachable = (sequence.num_computed_tokens - window + 1) // self.page_size
            if num_unreachable > table.num_freed[sequence.slot]:
                table.free_before(sequence.slot, num_unreachable)

    def free(self, sequence: Sequence) -> None:
        """Give back everything the sequence owns. No-op when it owns nothing."""
        if sequence.slot:
            for table in self._tables:
                table.free_all(sequence.slot)
            self._free_slots.append(sequence.slot)
            sequence.slot = 0
