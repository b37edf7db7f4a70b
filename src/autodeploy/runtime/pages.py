"""Page and slot bookkeeping: sequences go in, page tables and slots come out (no torch).

A slot is a sequence's row: in every page table here, and in every slot state on the device. Each group of paged states
has a pool of pages and one page table. Page 0 and slot 0 are scratch and never handed out.

Invariants, at any time and for every group:
  - a page is free or owned; free + owned = num_pages - 1;
  - only a page whose content is known (full, computed, published by its hash) is owned by several sequences, and nobody
    writes to it: a sequence writes behind `num_computed_tokens` only, to pages that it alone owns;
  - a sequence owns the pages of all positions that its future queries can see, and no others after
    `release_unreachable`;
  - table entries of pages not owned (freed, unused, or of a free slot) are 0.

Ownership changes in `PagePool.take`, `share` and `give` only. Which prefix a sequence may share is for
`prefix_cache.py` to say.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
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
    """The pages of one group: which are free, how many own each of the others, and whose content is known by its hash.

    A free page keeps its content, and may be shared again, until it is handed out anew. Pages of no known content are
    handed out first, then those freed longest ago.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_usable = num_pages - 1
        self._blank = list(range(num_pages - 1, 0, -1))  # free pages of no known content; the last is handed out first
        self._known: OrderedDict[int, None] = OrderedDict()  # the other free pages; the first is handed out first
        self._num_owners = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._known)

    def take(self, count: int) -> list[int]:
        """`count` pages, now owned by the caller alone. Raises RuntimeError when there are not enough."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages taken from a pool with {self.num_free} free ones")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._known.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        self._num_owners[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Own pages of known content together with whoever owns them already. RuntimeError for any other page."""
        for page in pages:
            if page not in self._hash_of:
                raise RuntimeError(f"page {page} shared, but its content is not known")
            self._num_owners[page] += 1
            self._known.pop(page, None)

    def give(self, pages: Iterable[int], *, is_wanted: bool = True) -> None:
        """Take pages back from one owner. Raises RuntimeError for a page that nobody owns.

        Args:
            is_wanted: False when their content will hardly be asked for: then they are handed out before others.
        """
        for page in pages:
            if page == 0 or not self._num_owners[page]:
                raise RuntimeError(f"page {page} given back, but nobody owns it")
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            if page in self._hash_of:
                self._known[page] = None
                self._known.move_to_end(page, last=is_wanted)
            else:
                self._blank.append(page)

    def publish(self, page: int, content: bytes) -> None:
        """Say what a full page holds, by its hash. When another page holds the same, that one stays the known one."""
        if content not in self._page_of and page not in self._hash_of:
            self._page_of[content] = page
            self._hash_of[page] = content

    def find(self, content: bytes) -> int | None:
        """The page that holds this, owned or free."""
        return self._page_of.get(content)

    def is_owned(self, page: int) -> bool:
        return self._num_owners[page] > 0


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Tokens that a sequence need not compute again.

    Attributes:
        num_tokens: how many, whole pages.
        pages: for each group, in the allocator's order, the pages that later queries can see; () without any tokens.
        snapshot: row of the slot states that holds them after these tokens; 0 when there is none to copy.
    """

    num_tokens: int = 0
    pages: tuple[list[int], ...] = ()
    snapshot: int = 0


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

    def adopt(self, slot: int, pages: SequenceOf[int], num_entries: int) -> None:
        """Start a slot that has nothing yet with shared pages, the last of its first `num_entries` entries."""
        first = num_entries - len(pages)
        self.pool.share(pages)
        self.table[slot, first:num_entries] = pages
        self.num_entries[slot], self.num_freed[slot] = num_entries, first

    def publish(self, slot: int, first: int, contents: SequenceOf[bytes]) -> None:
        """Say what the pages from entry `first` on hold."""
        pages = self.table[slot, first : first + len(contents)].tolist()
        for page, content in zip(pages, contents, strict=True):
            self.pool.publish(page, content)

    def num_unreachable(self, num_tokens: int) -> int:
        """Leading table entries that no query behind `num_tokens` tokens can see."""
        window = self.group.window
        return 0 if window is None else max(0, num_tokens - window + 1) // self.page_size

    def free_before(self, slot: int, num_entries: int, *, is_wanted: bool = True) -> None:
        """Give back the pages of the first `num_entries` table entries and zero the entries. See `PagePool.give`."""
        first = self.num_freed[slot]
        end = min(num_entries, self.num_entries[slot])
        if end > first:
            # The last first: of a prefix that nobody uses, its end is to be forgotten before its beginning.
            self.pool.give(reversed(self.table[slot, first:end].tolist()), is_wanted=is_wanted)
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
        self.tables = tuple(self.groups.values())
        self.room_tokens = [0] * num_slots
        """per slot, how many tokens have their pages in every group; 0 for a slot that nobody owns"""
        self._most_tokens = -(-max_model_len // page_size) * page_size
        self._windowed = [table for table in self.tables if table.group.window is not None]
        self._free_slots = deque(range(1, num_slots))
        self._num_usable_slots = num_slots - 1

    @property
    def has_windows(self) -> bool:
        """Whether `release_unreachable` may have something to do."""
        return bool(self._windowed)

    @property
    def page_tables(self) -> dict[str, NDArray[np.int32]]:
        """Live page tables `[num_slots, pages]` by group name; a sequence's row is its slot."""
        return {name: table.table for name, table in self.groups.items()}

    @property
    def usage_fraction(self) -> float:
        """Share of pages in use in the fullest group, or of slots when that is more."""
        used = [1 - table.pool.num_free / max(1, table.pool.num_usable) for table in self.tables]
        return max([1 - len(self._free_slots) / max(1, self._num_usable_slots), *used])

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether the paged states of one sequence this long fit when nothing else runs."""
        return all(table.group.max_pages(num_tokens, self.page_size) <= table.pool.num_usable for table in self.tables)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def has_free_pages(self, num_pages: int) -> bool:
        """Whether every group has more than this many free pages."""
        return all(table.pool.num_free > num_pages for table in self.tables)

    def can_admit(self, sequence: Sequence, prefix: Prefix, *, num_reserved_pages: int) -> bool:
        """Whether all tokens of a waiting sequence, which shares `prefix`, fit beside `num_reserved_pages` kept free
        per group.

        The whole sequence counts, not its first chunk: one admitted on a promise of pages that are not there would be
        preempted soon after, and its work lost.
        """
        if not self._free_slots:
            return False
        num_tokens = len(sequence.token_ids)
        for table, pages in zip(self.tables, prefix.pages or [()] * len(self.tables), strict=True):
            # Shared pages that somebody owns cost nothing; free ones are taken from those that are counted.
            num_pages = table.group.max_pages(num_tokens, self.page_size) - sum(map(table.pool.is_owned, pages))
            if num_pages + num_reserved_pages > table.pool.num_free:
                return False
        return True

    def adopt(self, sequence: Sequence, prefix: Prefix) -> None:
        """Own a slot, and together with others the pages of a known prefix. The sequence owns nothing yet."""
        sequence.slot = self._free_slots.popleft()
        for table, pages in zip(self.tables, prefix.pages, strict=False):
            table.adopt(sequence.slot, pages, prefix.num_tokens // self.page_size)
        self._note_room(sequence.slot)

    def can_allocate(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Whether `allocate` would grant all of them."""
        has_slot = bool(sequence.slot or self._free_slots)
        return has_slot and all(table.num_fitting_tokens(sequence) >= num_new_tokens for table in self.tables)

    def allocate(self, sequence: Sequence, num_new_tokens: int) -> int:
        """Own a slot, and pages for up to `num_new_tokens` tokens after `num_computed_tokens`.

        Returns how many tokens got their pages: fewer when pages run short, 0 (and nothing changed) when none did.
        """
        granted = num_new_tokens
        end = sequence.num_computed_tokens + num_new_tokens
        for table in self.tables:
            if end > table.num_entries[sequence.slot] * self.page_size:
                granted = min(granted, table.num_fitting_tokens(sequence))
        if granted <= 0 or not (sequence.slot or self._free_slots):
            return 0
        if not sequence.slot:
            sequence.slot = self._free_slots.popleft()
        end = sequence.num_computed_tokens + granted
        for table in self.tables:
            if end > table.num_entries[sequence.slot] * self.page_size:
                table.extend(sequence.slot, end)
        self._note_room(sequence.slot)
        return granted

    def _note_room(self, slot: int) -> None:
        entries = min((table.num_entries[slot] for table in self.tables), default=None)
        self.room_tokens[slot] = self._most_tokens if entries is None else entries * self.page_size

    def release_unreachable(self, sequence: Sequence) -> None:
        """Give back pages that lie wholly before the window of every query still to come."""
        for table in self._windowed:
            num_unreachable = table.num_unreachable(sequence.num_computed_tokens)
            num_freed = table.num_freed[sequence.slot]
            if num_unreachable > num_freed:
                # Prompts may part anywhere in a prompt. Within an output they do not, and there is little room.
                is_wanted = num_freed * self.page_size < sequence.num_prompt_tokens
                table.free_before(sequence.slot, num_unreachable, is_wanted=is_wanted)

    def free(self, sequence: Sequence) -> None:
        """Give back everything the sequence owns. No-op when it owns nothing."""
        if sequence.slot:
            for table in self.tables:
                table.free_all(sequence.slot)
            self.room_tokens[sequence.slot] = 0
            self._free_slots.append(sequence.slot)
            sequence.slot = 0
