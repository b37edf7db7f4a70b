"""No page leaked, none with two writers, none freed that can still be seen: checked after every move of random play."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from autodeploy.runtime.pages import PageGroup, PagePool, Prefix, StateAllocator
from autodeploy.runtime.prefix_cache import PrefixCache
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence

PAGE_SIZE = 4
MAX_MODEL_LEN = 64


def make_sequence(num_tokens: int = 1, arrival: int = 0) -> Sequence:
    return Sequence(Request("r", [0] * num_tokens, SamplingParams(), arrival), 0, Limits(100, MAX_MODEL_LEN))


def make_allocator(full: int = 0, windows: dict[int, int] | None = None, num_slots: int = 4) -> StateAllocator:
    groups = [PageGroup(name="full", num_pages=full)] if full else []
    groups += [PageGroup(name=f"window_{w}", num_pages=n, window=w) for w, n in (windows or {}).items()]
    return StateAllocator(groups, num_slots=num_slots, page_size=PAGE_SIZE, max_model_len=MAX_MODEL_LEN)


class AllocatorPlay(RuleBasedStateMachine):
    """Sequences come, alone or behind a known prefix, grow by chunks, commit, and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = make_allocator(full=13, windows={1: 6, 5: 9, 12: 8}, num_slots=4)
        self.prefixes = PrefixCache(self.allocator, snapshot_rows=None)
        self.live: list[Sequence] = []
        self.written: dict[tuple[str, int], list[int]] = {}
        """by page, the tokens up to the last one written to it"""

    @precondition(lambda self: len(self.live) < 5)
    @rule(common=st.sampled_from([0, 10, 25, MAX_MODEL_LEN]), own=st.integers(1, 3), is_cached=st.booleans())
    def arrive(self, common: int, own: int, is_cached: bool) -> None:
        """All play from a few texts: `common` tokens of one, then tokens of their own."""
        sequence = make_sequence()
        sequence.token_ids = [0] * common + [own] * (MAX_MODEL_LEN - common)
        prefix = self.prefixes.find(sequence)
        if is_cached and self.allocator.can_admit(sequence, prefix, num_reserved_pages=0):
            self.allocator.adopt(sequence, prefix)
            sequence.num_computed_tokens = prefix.num_tokens
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 4), count=st.integers(1, 20), commits=st.booleans())
    def grow(self, which: int, count: int, commits: bool) -> None:
        sequence = self.live[which % len(self.live)]
        count = min(count, MAX_MODEL_LEN - sequence.num_computed_tokens)
        if count == 0:
            return
        could = self.allocator.can_allocate(sequence, count)
        before = sum(table.pool.num_free for table in self.allocator.groups.values())
        granted = self.allocator.allocate(sequence, count)
        assert could == (granted == count)
        if granted == 0:
            assert before == sum(table.pool.num_free for table in self.allocator.groups.values())
            assert not self.allocator.can_allocate(sequence, 1)
        if granted and commits:
            before = sequence.num_computed_tokens
            sequence.num_computed_tokens += granted
            self.write(sequence, before)
            self.prefixes.publish(sequence, before)
            self.allocator.release_unreachable(sequence)

    def write(self, sequence: Sequence, before: int) -> None:
        for table in self.allocator.tables:
            for entry in range(before // PAGE_SIZE, -(-sequence.num_computed_tokens // PAGE_SIZE)):
                end = min((entry + 1) * PAGE_SIZE, sequence.num_computed_tokens)
                self.written[table.group.name, int(table.table[sequence.slot, entry])] = sequence.token_ids[:end]

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 4))
    def leave(self, which: int) -> None:
        sequence = self.live.pop(which % len(self.live))
        self.allocator.free(sequence)
        self.allocator.free(sequence)  # the second time is a no-op
        assert sequence.slot == 0

    @invariant()
    def slots_are_owned_once(self) -> None:
        slots = [sequence.slot for sequence in self.live if sequence.slot]
        assert len(slots) == len(set(slots)) and all(0 < slot < 4 for slot in slots)

    @invariant()
    def no_page_is_lost_and_none_has_two_writers(self) -> None:
        for table in self.allocator.groups.values():
            owned = Counter(int(page) for row in table.table for page in row if page)
            assert all(0 < page < table.group.num_pages for page in owned)
            assert len(owned) + table.pool.num_free == table.group.num_pages - 1, "a page is lost"
            for sequence in self.live:
                row = table.table[sequence.slot] if sequence.slot else []
                for entry, page in enumerate(row):
                    if page and entry >= sequence.num_computed_tokens // PAGE_SIZE:
                        assert owned[int(page)] == 1, "a page that is still written to has two owners"

    @invariant()
    def known_pages_hold_what_they_say(self) -> None:
        """What was last written to the pages of a prefix that is found are the sequence's own tokens."""
        for sequence in self.live:
            prefix = self.prefixes.find(sequence)
            for table, pages in zip(self.allocator.tables, prefix.pages, strict=False):
                first = prefix.num_tokens // PAGE_SIZE - len(pages)
                for entry, page in enumerate(pages, start=first):
                    end = (entry + 1) * PAGE_SIZE
                    assert self.written[table.group.name, page] == sequence.token_ids[:end]

    @invariant()
    def what_can_be_seen_is_there_and_nothing_else(self) -> None:
        slots = {sequence.slot: sequence for sequence in self.live if sequence.slot}
        for table in self.allocator.groups.values():
            for slot, row in enumerate(table.table):
                if slot not in slots:
                    assert not row.any(), "a free slot still points at pages"
                    continue
                computed, window = slots[slot].num_computed_tokens, table.group.window
                first = 0 if window is None else max(0, computed - window + 1)
                assert all(row[position // PAGE_SIZE] for position in range(first, computed))
                assert not row[: first // PAGE_SIZE].any(), "a page before the window is still owned"

    @invariant()
    def room_is_what_the_pages_of_every_group_hold(self) -> None:
        owned = {sequence.slot for sequence in self.live} - {0}
        for slot, room in enumerate(self.allocator.room_tokens):
            num_entries = min(table.num_entries[slot] for table in self.allocator.tables)
            assert room == (num_entries * PAGE_SIZE if slot in owned else 0)


AllocatorPlay.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocatorPlay = AllocatorPlay.TestCase


def test_pages_come_in_order_and_scratch_is_never_handed_out() -> None:
    allocator = make_allocator(full=6)
    sequence = make_sequence()
    assert allocator.allocate(sequence, 9) == 9
    assert sequence.slot == 1
    assert allocator.page_tables["full"][1, :4].tolist() == [1, 2, 3, 0]


def test_a_short_pool_grants_what_it_has() -> None:
    allocator = make_allocator(full=4)
    first, second = make_sequence(), make_sequence()
    assert allocator.allocate(first, 8) == 8
    assert allocator.allocate(second, 100) == 4
    second.num_computed_tokens = 4
    assert allocator.allocate(second, 1) == 0
    allocator.free(first)
    assert allocator.allocate(second, 1) == 1


def test_without_a_slot_nothing_is_granted() -> None:
    allocator = make_allocator(full=9, num_slots=2)
    assert allocator.allocate(make_sequence(), 1) == 1
    other = make_sequence()
    assert not allocator.can_allocate(other, 1)
    assert allocator.allocate(other, 1) == 0
    assert not allocator.can_admit(other, Prefix(), num_reserved_pages=0)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 7, 11])
def test_a_window_of_its_stated_size_serves_a_sequence_of_any_length(window: int) -> None:
    group = PageGroup(name="w", num_pages=0, window=window)
    num_pages = group.max_pages(MAX_MODEL_LEN, PAGE_SIZE)
    for usable, fits in ((num_pages, True), (num_pages - 1, False)):
        allocator = make_allocator(windows={window: usable + 1})
        assert allocator.can_ever_fit(MAX_MODEL_LEN) is fits
        sequence = make_sequence()
        reached = 0
        while reached < MAX_MODEL_LEN and allocator.allocate(sequence, 1):
            reached = sequence.num_computed_tokens = sequence.num_computed_tokens + 1
            allocator.release_unreachable(sequence)
        assert (reached == MAX_MODEL_LEN) is fits


def test_a_slots_only_model_needs_no_pages() -> None:
    allocator = make_allocator(num_slots=3)
    assert allocator.can_ever_fit(10**9) and allocator.usage_fraction == 0
    assert allocator.allocate(make_sequence(), 50) == 50
    assert allocator.usage_fraction == 0.5


def test_freeing_what_nobody_owns_is_an_error() -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    pool.give(pages)
    for bad in (pages[:1], [0], [3]):
        with pytest.raises(RuntimeError, match="nobody owns"):
            pool.give(bad)
    with pytest.raises(RuntimeError, match="not known"):
        pool.share(pages[:1])
    with pytest.raises(RuntimeError, match="4 pages"):
        pool.take(4)


def test_pages_of_no_known_content_go_first_then_those_freed_longest_ago() -> None:
    pool = PagePool(6)
    pages = pool.take(5)
    for page in pages[:4]:
        pool.publish(page, bytes([page]))
    pool.publish(pages[4], bytes([pages[0]]))  # the same as another page: that one stays the known one
    pool.give([pages[2], pages[0], pages[4], pages[3], pages[1]])
    assert pool.find(bytes([pages[0]])) == pages[0]
    pool.share([pages[2]])
    assert pool.take(3) == [pages[4], pages[0], pages[3]]
    assert pool.find(bytes([pages[0]])) is None and pool.find(bytes([pages[1]])) == pages[1]


def test_what_will_hardly_be_asked_for_goes_before_what_was_freed_long_ago() -> None:
    pool = PagePool(5)
    pages = pool.take(4)
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.give(pages[:2])
    pool.give(pages[2:3], is_wanted=False)
    assert pool.find(bytes([pages[2]])) == pages[2]
    assert pool.take(2) == [pages[2], pages[0]]


def test_a_page_is_free_when_its_last_owner_is_gone() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.publish(page, b"a")
    pool.share([page])
    pool.give([page])
    assert pool.num_free == 0 and pool.is_owned(page)
    pool.give([page])
    assert pool.num_free == 1 and not pool.is_owned(page)
