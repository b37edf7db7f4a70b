"""Which prefix is found (whole pages, every kind of state, one salt), where snapshots are made, what is forgotten."""

from collections.abc import Sequence as SequenceOf

import pytest

from autodeploy.runtime.pages import PageGroup, StateAllocator
from autodeploy.runtime.prefix_cache import SNAPSHOT_PAGES, PrefixCache, Snapshots, page_hash
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence

PAGE_SIZE = 4
SNAPSHOT_TOKENS = SNAPSHOT_PAGES * PAGE_SIZE


class Play:
    """An allocator and its prefix cache; sequences run through both as the scheduler would have them run."""

    def __init__(self, *, full: int = 60, window: int = 0, window_pages: int = 60, num_snapshots: int | None = None):
        groups = [PageGroup(name="full", num_pages=full)] if full else []
        groups += [PageGroup(name="window", num_pages=window_pages, window=window)] if window else []
        self.allocator = StateAllocator(groups, num_slots=5, page_size=PAGE_SIZE, max_model_len=100)
        rows = None if num_snapshots is None else range(5, 5 + num_snapshots)
        self.prefixes = PrefixCache(self.allocator, snapshot_rows=rows)

    def hit(self, token_ids: SequenceOf[int], salt: str | None = None) -> int:
        return self.prefixes.find(make_sequence(token_ids, salt)).num_tokens

    def start(self, token_ids: SequenceOf[int], salt: str | None = None) -> Sequence:
        sequence = make_sequence(token_ids, salt)
        prefix = self.prefixes.find(sequence)
        self.allocator.adopt(sequence, prefix)
        self.prefixes.start(sequence, prefix)
        sequence.num_computed_tokens = prefix.num_tokens
        return sequence

    def compute(self, sequence: Sequence, most: int = 1000) -> list[int]:
        """Compute all tokens, at most so many at once; returns how many tokens had a snapshot made after them."""
        kept = []
        while sequence.num_computed_tokens < len(sequence.token_ids):
            before = sequence.num_computed_tokens
            count = self.prefixes.limit_chunk(sequence, min(most, len(sequence.token_ids) - before))
            count = self.allocator.allocate(sequence, count)
            assert count > 0
            sequence.num_computed_tokens += count
            if self.prefixes.publish(sequence, before):
                kept.append(sequence.num_computed_tokens)
            self.allocator.release_unreachable(sequence)
        return kept

    def run(self, token_ids: SequenceOf[int], salt: str | None = None) -> list[int]:
        sequence = self.start(token_ids, salt)
        kept = self.compute(sequence)
        self.allocator.free(sequence)
        return kept


def make_sequence(token_ids: SequenceOf[int], salt: str | None = None) -> Sequence:
    request = Request("r", list(token_ids), SamplingParams(), 0, cache_salt=salt)
    return Sequence(request, 0, Limits(1000, 100))


def test_a_hash_covers_the_tokens_and_all_before_them() -> None:
    assert page_hash(b"", [1, 2]) == page_hash(b"", (1, 2))
    different = {page_hash(b"", [1, 2]), page_hash(b"", [2, 1]), page_hash(b"x", [1, 2]), page_hash(b"", [1, 2, 0])}
    assert len(different) == 4 and page_hash(b"", [256]) != page_hash(b"", [1])


def test_whole_pages_are_found_and_the_last_token_is_not() -> None:
    play = Play()
    text = list(range(11))
    play.run(text)
    assert [play.hit(text[:n]) for n in (3, 4, 5, 8, 9, 11)] == [0, 0, 4, 4, 8, 8]
    assert play.hit([*text[:8], 50]) == 8 and play.hit([*text[:7], 50, 51]) == 4 and play.hit([50, *text]) == 0


def test_salts_keep_prefixes_apart() -> None:
    play = Play()
    play.run(range(9), "one")
    assert play.hit(range(9), "one") == 8
    assert play.hit(range(9), "two") == play.hit(range(9)) == 0


def test_a_prompt_whose_logits_are_wanted_is_computed_as_far_as_they_are() -> None:
    play = Play()
    play.run(range(21))
    request = Request("r", list(range(21)), SamplingParams(prompt_logprobs=0), 0)
    sequence = Sequence(request, 0, Limits(1000, 100))
    assert play.prefixes.find(sequence).num_tokens == 0
    sequence.prompt_logprobs += [{}] * 12  # before a preemption, this was said of tokens 1 to 12
    assert play.prefixes.find(sequence).num_tokens == 12
    sequence.token_ids.append(0)  # its prompt is told
    assert play.prefixes.find(sequence).num_tokens == 20


def test_pages_are_shared_with_a_running_sequence_and_counted() -> None:
    play = Play(full=8)
    first = play.start(range(12))
    play.compute(first)
    second = play.start([*range(12), 50])
    assert second.num_cached_tokens == 12
    tables = play.allocator.page_tables["full"]
    assert tables[first.slot, :3].tolist() == tables[second.slot, :3].tolist()
    assert play.allocator.usage_fraction == pytest.approx(2 / 4)  # slots; of seven pages three are in use
    play.allocator.free(first)
    play.compute(second)
    assert play.hit([*range(12), 50]) == 12
    assert (play.prefixes.num_queried_tokens, play.prefixes.num_hit_tokens) == (25, 12)


def test_shared_pages_do_not_count_against_an_admission() -> None:
    play = Play(full=6)  # five pages
    first = play.start(range(12))
    play.compute(first)
    other, same = make_sequence([50] * 13), make_sequence([*range(12), 50])
    assert not play.allocator.can_admit(other, play.prefixes.find(other), num_reserved_pages=1)
    assert play.allocator.can_admit(same, play.prefixes.find(same), num_reserved_pages=1)
    play.allocator.free(first)  # now the prefix lies in free pages, which are what is admitted to
    assert play.allocator.can_admit(same, play.prefixes.find(same), num_reserved_pages=1)
    assert not play.allocator.can_admit(same, play.prefixes.find(same), num_reserved_pages=2)


def test_under_pressure_the_end_of_the_oldest_goes_first() -> None:
    play = Play(full=9)  # eight pages
    play.run(range(16))
    play.run(range(50, 62))
    play.run(range(70, 78))  # takes the one blank page and the last of the oldest four
    assert play.hit(range(17)) == 12 and play.hit(range(50, 63)) == 12
    play.run(range(12))  # was used again: now the second text is the oldest
    play.run(range(80, 92))
    assert play.hit(range(13)) == 12 and play.hit(range(50, 63)) == 0


def test_a_window_needs_the_pages_that_can_still_be_seen() -> None:
    play = Play(window=6, window_pages=5)
    play.run(range(30))
    found = play.prefixes.find(make_sequence(range(29)))
    full, window = found.pages
    assert found.num_tokens == 28 and len(full) == 7 and len(window) == 2
    assert play.hit(range(13)) == 0, "the window's pages behind twelve tokens were taken for later ones"
    sequence = play.start(range(30))
    assert play.allocator.page_tables["window"][sequence.slot, :8].tolist() == [0] * 5 + window + [0]
    play.compute(sequence)


def test_a_window_that_moves_through_an_output_leaves_other_windows_alone() -> None:
    play = Play(window=6, window_pages=13)
    play.run(range(50, 67))
    sequence = play.start(range(9))
    for token in range(9, 90):
        play.compute(sequence)
        sequence.token_ids.append(token)
    play.allocator.free(sequence)
    assert play.hit(range(50, 67)) == 16 and play.hit(range(9)) == 8 and play.hit(range(90)) == 88


def test_slots_need_a_snapshot_at_that_very_place() -> None:
    play = Play(num_snapshots=3)
    assert play.run(range(41)) == [40]
    assert play.hit(range(41)) == 40 and play.hit(range(42)) == 40
    assert play.hit(range(40)) == 0 and play.hit([*range(36), 50, 51, 52, 53, 54]) == 0
    found = play.prefixes.find(make_sequence(range(41)))
    assert found.snapshot in range(5, 8) and len(found.pages[0]) == 10


def test_a_snapshot_is_made_where_prompts_part() -> None:
    play = Play(num_snapshots=3)
    play.run([*range(22), 50, 51, 52])
    assert play.run([*range(22), 60, 61, 62]) == [20]
    assert play.hit([*range(22), 70]) == 20


def test_short_prompts_are_not_cut() -> None:
    play = Play(num_snapshots=3)
    sequence = play.start(range(SNAPSHOT_TOKENS - 1))
    assert play.prefixes.limit_chunk(sequence, SNAPSHOT_TOKENS - 1) == SNAPSHOT_TOKENS - 1
    sequence = play.start(range(SNAPSHOT_TOKENS + 2))
    assert play.prefixes.limit_chunk(sequence, SNAPSHOT_TOKENS + 2) == SNAPSHOT_TOKENS


def test_chunks_that_the_budget_cuts_end_at_pages() -> None:
    play = Play(num_snapshots=3)
    sequence = play.start(range(70))
    assert [play.prefixes.limit_chunk(sequence, n) for n in (3, 4, 7, 31)] == [3, 4, 4, 28]
    assert play.compute(sequence, most=31) == [28, 56]  # at 68 it would be too close


def test_of_the_output_one_snapshot_is_kept() -> None:
    play = Play(num_snapshots=3)
    play.run(range(50, 67))  # a bystander
    sequence = play.start(range(17))
    kept = play.compute(sequence)
    for token in range(17, 60):
        sequence.token_ids.append(token)
        kept += play.compute(sequence)
    assert kept == [16, 32, 48]
    assert play.hit(range(61)) == 48 and play.hit(range(33)) == 16 and play.hit(range(50, 67)) == 16


def test_without_pages_snapshots_alone_decide() -> None:
    play = Play(full=0, num_snapshots=2)
    play.run(range(20))
    assert play.hit(range(20)) == 16 and play.hit(range(17)) == 16 and play.hit(range(16)) == 0


def test_nothing_is_found_where_nothing_is_kept() -> None:
    for play in (Play(full=0), Play(num_snapshots=0)):
        assert play.run(range(40)) == [] and play.hit(range(40)) == 0
        assert play.prefixes.limit_chunk(make_sequence(range(40)), 40) == 40


def test_the_snapshot_used_longest_ago_gives_up_its_row() -> None:
    snapshots = Snapshots(range(7, 9))
    rows = [snapshots.make(b"a"), snapshots.make(b"b")]
    snapshots.use(b"a")
    assert sorted(rows) == [7, 8] and snapshots.make(b"c") == snapshots.row(b"c") == rows[1]
    assert b"a" in snapshots and b"b" not in snapshots
    snapshots.discard(b"a")
    snapshots.discard(b"a")
    assert snapshots.make(b"d") == rows[0] and b"c" in snapshots
