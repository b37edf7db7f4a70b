"""Who runs, in what order, with how many tokens; and that everybody finishes."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autodeploy.runtime.pages import PageGroup, StateAllocator
from autodeploy.runtime.prefix_cache import PrefixCache
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence, Status
from autodeploy.runtime.scheduler import ScheduledStep, Scheduler

PAGE_SIZE = 4


def make_sequence(num_tokens: int, *, arrival: int, priority: int = 0, max_tokens: int = 1000) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(Request("r", [0] * num_tokens, params, arrival, priority), 0, Limits(100, 64))


@dataclass
class Loop:
    """A scheduler with an engine around it that samples token 0."""

    scheduler: Scheduler
    allocator: StateAllocator
    budget: int

    @staticmethod
    def make(
        *, num_pages: int = 100, window_pages: int = 0, num_slots: int = 9, budget: int = 16, caches: bool = False
    ) -> "Loop":
        groups = [PageGroup(name="full", num_pages=num_pages)]
        groups += [PageGroup(name="window_5", num_pages=window_pages, window=5)] if window_pages else []
        allocator = StateAllocator(groups, num_slots=num_slots, page_size=PAGE_SIZE, max_model_len=64)
        prefixes = PrefixCache(allocator, snapshot_rows=None, is_enabled=caches)
        return Loop(Scheduler(allocator, prefixes, max_num_batched_tokens=budget), allocator, budget)

    def add(self, num_tokens: int, *, arrival: int, priority: int = 0, max_tokens: int = 1000) -> Sequence:
        sequence = make_sequence(num_tokens, arrival=arrival, priority=priority, max_tokens=max_tokens)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> ScheduledStep:
        step = self.scheduler.schedule()
        for sequence, count in step.scheduled.items():
            assert sequence.status is Status.RUNNING and sequence.slot
            assert 0 < count <= len(sequence.token_ids) - sequence.num_computed_tokens
        assert sum(step.scheduled.values()) <= self.budget
        assert not set(step.preempted) & set(step.scheduled)
        self.scheduler.commit(step.scheduled)
        for sequence in step.scheduled:
            if sequence.num_computed_tokens == len(sequence.token_ids):
                sequence.append(0)
                if sequence.finish_reason:
                    self.scheduler.finish(sequence)
        return step


def test_prompts_are_chunked_by_the_budget_and_decodes_go_first() -> None:
    loop = Loop.make(budget=10)
    short, long = loop.add(4, arrival=0), loop.add(25, arrival=1)
    assert loop.step().scheduled == {short: 4, long: 6}
    third = loop.add(3, arrival=2)
    assert list(loop.step().scheduled.items()) == [(short, 1), (long, 9)]
    assert list(loop.step().scheduled.items()) == [(short, 1), (long, 9)]
    assert list(loop.step().scheduled.items()) == [(short, 1), (long, 1), (third, 3)]


def test_waiting_sequences_run_by_priority_then_arrival() -> None:
    loop = Loop.make(num_slots=2)
    added = [loop.add(2, arrival=at, priority=p, max_tokens=1) for at, p in enumerate((1, 0, -1, 0))]
    served = [next(iter(loop.step().scheduled)) for _ in added]
    assert served == [added[2], added[1], added[3], added[0]]


def test_the_last_running_sequence_is_preempted_and_recomputed() -> None:
    loop = Loop.make(num_pages=6)  # five pages, 20 tokens
    first, second = loop.add(7, arrival=0), loop.add(7, arrival=1)
    loop.step()
    assert first.num_computed_tokens == second.num_computed_tokens == 7
    steps = [loop.step() for _ in range(4)]
    preempting = next(step for step in steps if step.preempted)
    assert preempting.preempted == [second] and preempting.scheduled == {first: 1}
    assert second.status is Status.WAITING and second.num_computed_tokens == 0 and second.slot == 0
    assert len(second.token_ids) > 7, "its output is kept"
    assert loop.scheduler.num_preemptions == 1
    loop.scheduler.finish(first)
    assert loop.step().scheduled == {second: len(second.token_ids) - 1}


def test_a_preempted_sequence_goes_on_from_the_pages_that_nobody_took() -> None:
    loop = Loop.make(num_pages=9, caches=True)  # eight pages
    first, second = loop.add(11, arrival=0), make_sequence(15, arrival=1)
    second.token_ids[0] = 1  # not the first one's prefix
    loop.scheduler.add(second)
    steps = [loop.step() for _ in range(8)]
    assert [step.preempted for step in steps if step.preempted] == [[second]]
    loop.scheduler.finish(first)
    step = loop.step()
    # The pages of 16 tokens were given back; the first one took the page of the last four.
    assert second.num_cached_tokens == 0 and step.scheduled == {second: len(second.token_ids) - 1 - 12}


def test_drafts_are_granted_from_what_is_left_only() -> None:
    loop = Loop.make(budget=7)
    first, second = loop.add(3, arrival=0), loop.add(3, arrival=1)
    loop.step()
    for sequence in (first, second):
        sequence.draft_token_ids = [5, 6, 7, 8]
    step = loop.scheduler.schedule()
    assert step.scheduled == {first: 5, second: 1}, "the second one's token comes before the first one's drafts"
    assert first.draft_token_ids == [5, 6, 7, 8] and second.draft_token_ids == []


def test_drafts_take_no_page_that_another_may_need() -> None:
    loop = Loop.make(num_pages=4)  # three pages
    first, second = loop.add(3, arrival=0), loop.add(2, arrival=1)
    loop.step()
    first.draft_token_ids = [5, 6]
    assert loop.scheduler.schedule().scheduled == {first: 1, second: 1} and first.draft_token_ids == []


def test_a_lower_priority_is_preempted_although_it_came_first() -> None:
    loop = Loop.make(num_pages=6)
    late = loop.add(7, arrival=0, priority=1)
    loop.step()
    urgent = loop.add(7, arrival=1, priority=0)
    preempted = [sequence for _ in range(6) for sequence in loop.step().preempted]
    assert preempted == [late] and urgent.status is Status.RUNNING


def test_nobody_overtakes_a_long_prompt_that_waits_for_pages() -> None:
    loop = Loop.make(num_pages=11, budget=64)
    running = loop.add(20, arrival=0, max_tokens=5)
    loop.step()
    long, short = loop.add(30, arrival=1, max_tokens=1), loop.add(1, arrival=2, max_tokens=1)
    while running.status is Status.RUNNING:
        assert set(loop.step().scheduled) == {running}
    assert list(loop.step().scheduled) == [long, short]


def test_a_stream_of_long_prompts_starves_nobody() -> None:
    """More long prompts come than can be computed: who decodes goes on, and who came first goes first."""
    loop = Loop.make(num_pages=400, num_slots=40, budget=16)
    decoding = loop.add(2, arrival=0, max_tokens=60)
    loop.step()
    earlier = [loop.add(40, arrival=1 + at, max_tokens=1) for at in range(4)]
    short = loop.add(3, arrival=5, max_tokens=1)
    later = []
    while short.status is not Status.FINISHED:
        later.append(loop.add(40, arrival=6 + len(later), max_tokens=1))
        assert loop.step().scheduled[decoding] == 1
    # 4 · 40 + 3 tokens at 15 a step beside the one that decodes.
    assert len(later) == 11 and all(sequence.status is Status.FINISHED for sequence in earlier)
    assert not any(sequence.finish_reason for sequence in later)


def test_a_sequence_that_can_never_fit_fails_and_the_next_one_runs() -> None:
    loop = Loop.make(num_pages=4, budget=64)
    too_long, fits = loop.add(13, arrival=0), loop.add(12, arrival=1, max_tokens=1)
    step = loop.step()
    assert step.failed == [too_long] and list(step.scheduled) == [fits]
    assert too_long.finish_reason == "error" and "13 tokens" in str(too_long.stop_reason)
    assert too_long.status is Status.FINISHED


def test_a_sequence_that_outgrows_the_memory_alone_fails() -> None:
    loop = Loop.make(num_pages=3)
    sequence = loop.add(6, arrival=0)
    failed = [failed for _ in range(10) for failed in loop.step().failed]
    assert failed == [sequence] and len(sequence.token_ids) == 9  # eight in the states, one sampled after them
    assert loop.allocator.usage_fraction == 0


def test_finishing_a_waiting_sequence_takes_it_out() -> None:
    loop = Loop.make(num_slots=2)
    running, waiting, other = (loop.add(2, arrival=at) for at in range(3))
    loop.step()
    loop.scheduler.finish(waiting)
    assert set(loop.scheduler.sequences()) == {running, other}
    assert loop.scheduler.num_waiting == 1


arrivals = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1)), min_size=1, max_size=9
)


@settings(max_examples=80)
@given(
    arrivals=arrivals,
    num_pages=st.integers(5, 20),
    window_pages=st.sampled_from([0, 5, 9]),
    num_slots=st.integers(2, 6),
    budget=st.integers(1, 24),
    caches=st.booleans(),
)
def test_every_sequence_finishes_and_everything_is_given_back(
    arrivals: list[tuple[int, int, int, int]],
    num_pages: int,
    window_pages: int,
    num_slots: int,
    budget: int,
    caches: bool,
) -> None:
    loop = Loop.make(num_pages=num_pages, window_pages=window_pages, num_slots=num_slots, budget=budget, caches=caches)
    sequences = []
    num_steps = 0
    while len(sequences) < len(arrivals) or any(sequence.status is not Status.FINISHED for sequence in sequences):
        for at, (when, num_tokens, max_tokens, priority) in enumerate(arrivals):
            if when == num_steps or (at >= len(sequences) and num_steps > 12):
                sequences.append(loop.add(num_tokens, arrival=at, priority=priority, max_tokens=max_tokens))
        before = [sequence.num_computed_tokens for sequence in loop.scheduler.running[:1]]
        first = loop.scheduler.running[:1]
        step = loop.step()
        if first and first[0] in loop.scheduler.running[:1] and budget >= num_slots:
            assert first[0].num_computed_tokens > before[0], "the first sequence made no progress"
        assert [running.order for running in loop.scheduler.running] == sorted(
            running.order for running in loop.scheduler.running
        )
        assert step.scheduled or step.failed or not sequences or not list(loop.scheduler.sequences())
        num_steps += 1
        assert num_steps < 5000, "no end in sight"
    assert loop.allocator.usage_fraction == 0
    for sequence in sequences:
        if sequence.finish_reason == "error":
            assert -(-len(sequence.token_ids) // PAGE_SIZE) > num_pages - 1, "it would have fitted alone"
        else:
            assert sequence.finish_reason == "length" and len(sequence.token_ids) == sequence.max_length


@pytest.mark.parametrize("priority", [0, 5])
def test_orders_are_total(priority: int) -> None:
    params = SamplingParams(n=2)
    siblings = [Sequence(Request("r", [0], params, 0, priority), index, Limits(9, 9)) for index in (1, 0)]
    scheduler = Loop.make().scheduler
    for sequence in siblings:
        scheduler.add(sequence)
    assert [sequence.index for sequence in scheduler.schedule().scheduled] == [0, 1]
