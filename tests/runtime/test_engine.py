"""Every schedule gives exactly the tokens of a plain Python loop: chunked, mixed, preempted, aborted, n > 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from autodeploy.config import EngineOptions
from autodeploy.errors import (
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams, TokenOutput
from autodeploy.runtime.stats import EngineStats
from tests.runtime.toy import VOCAB, reference_tokens, toy_program

DRAFT_MODEL = {"model": "the same layers, with errors", "num_speculative_tokens": 3}
LAYERS = [("full",), ("window",), ("slot",), ("window", "full"), ("slot", "full", "window"), ("full", "window", "slot")]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def make_engine(
    layers: Sequence[str] = ("full",), *, max_model_len: int = 64, program: Any = None, **options: Any
) -> Engine:
    chosen = program or toy_program(layers)
    chosen_options = EngineOptions(**{"page_size": 4, "max_num_seqs": 4, **options})
    # A draft model with other kinds of layers than the model could draft nothing right: it has the same, and errs.
    draft = toy_program(layers, max_model_len=40, err_every=3)
    return Engine(chosen, chosen_options, max_model_len, draft=draft)


def short_memory(layers: Sequence[str], num_tokens: int, drafts: Mapping[str, Any] | None = None) -> int:
    """Bytes for this many tokens in each paged layer, and a few slots; with drafts, as much beside them."""
    num_bytes = 8 * num_tokens * sum(layer != "slot" for layer in layers) + 8 * 8 * layers.count("slot")
    return num_bytes if drafts is None else 2 * num_bytes


def drain(engine: Any) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return tokens


@dataclass(frozen=True)
class Job:
    """One request of a random schedule: when it comes, what it asks, when it is aborted if at all."""

    when: int
    prompt: list[int]
    max_tokens: int
    n: int
    priority: int
    abort_after: int | None
    salt: str | None = None


STEM = Random(0).choices(range(VOCAB), k=24)
prompts = st.builds(
    lambda shared, own: STEM[:shared] + own,
    shared=st.sampled_from([0, 3, 8, 15, 24]),  # what prompts have in common
    own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
)
jobs = st.builds(
    Job,
    when=st.sampled_from([0, 0, 1, 4, 8]),
    prompt=prompts,
    max_tokens=st.sampled_from([1, 4, 13, 24]),
    n=st.sampled_from([1, 1, 3]),
    priority=st.integers(0, 1),
    abort_after=st.sampled_from([None, None, None, 2, 6]),
    salt=st.sampled_from([None, None, "salt"]),
)


def run_schedule(
    layers: tuple[str, ...],
    jobs: list[Job],
    page_size: int,
    max_num_seqs: int,
    budget: int,
    is_short_of_memory: bool,
    **options: Any,
) -> EngineStats:
    """Run the jobs and check every token."""
    drafts = options.get("speculative_config")
    engine = make_engine(
        layers,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        # room for one longest sequence (48 tokens, a window more) and little else: what preempts
        kv_cache_memory_bytes=short_memory(layers, 48 + 12, drafts) if is_short_of_memory else None,
        max_model_len=48,
        **options,
    )
    got: dict[tuple[int, int], list[int]] = {(at, i): [] for at, job in enumerate(jobs) for i in range(job.n)}
    finished: dict[tuple[int, int], str] = {}
    num_steps = 0

    def take(outputs: list[TokenOutput]) -> None:
        for output in outputs:
            key = (int(output.request_id), output.index)
            assert key not in finished, "output after the end"
            got[key] += output.token_ids
            if output.finish_reason:
                finished[key] = output.finish_reason

    while num_steps <= 8 or engine.has_unfinished_requests():
        for at, job in enumerate(jobs):
            if job.when == num_steps:
                params = SamplingParams(temperature=0, max_tokens=job.max_tokens, n=job.n)
                engine.add_request(str(at), job.prompt, params, priority=job.priority, cache_salt=job.salt)
            if job.abort_after is not None and job.when + job.abort_after == num_steps:
                take(engine.abort_request(str(at), job.n - 1))
        take(engine.step())
        num_steps += 1
        assert num_steps < 3000, "no end in sight"
    assert finished.keys() == got.keys()
    for (at, index), tokens in got.items():
        expected = reference_tokens(layers, jobs[at].prompt, min(jobs[at].max_tokens, 48 - len(jobs[at].prompt)))
        if finished[at, index] == "abort":
            expected = expected[: len(tokens)]
        else:
            assert finished[at, index] == "length"
        assert tokens == expected
    assert engine.stats().state_usage_fraction == 0
    return engine.stats()


@settings(max_examples=80)
@given(
    layers=st.sampled_from(LAYERS),
    jobs=st.lists(jobs, min_size=2, max_size=6),
    page_size=st.sampled_from([1, 2, 3]),
    max_num_seqs=st.sampled_from([1, 3, 5]),
    budget=st.integers(1, 20),
    is_short_of_memory=st.booleans(),
    caches=st.sampled_from([True, True, False]),
    drafts=st.sampled_from([None, None, DRAFT_MODEL, {"prompt_lookup_min": 1}]),
    is_asynchronous=st.booleans(),
)
def test_every_schedule_gives_the_tokens_of_a_plain_loop(
    layers: tuple[str, ...],
    jobs: list[Job],
    page_size: int,
    max_num_seqs: int,
    budget: int,
    is_short_of_memory: bool,
    caches: bool,
    drafts: dict[str, Any] | None,
    is_asynchronous: bool,
) -> None:
    options = {
        "enable_prefix_caching": caches,
        "speculative_config": drafts,
        "async_scheduling": is_asynchronous,
    }
    run_schedule(layers, jobs, page_size, max_num_seqs, budget, is_short_of_memory, **options)


def crowd(random: Random, count: int) -> list[Job]:
    """Jobs that come close together and run long."""
    return [
        Job(
            when=random.randrange(6),
            prompt=STEM[: random.choice([0, 5, 12])] + random.choices(range(VOCAB), k=random.randint(1, 9)),
            max_tokens=random.randint(10, 30),
            n=random.choice([1, 2]),
            priority=random.randrange(2),
            abort_after=random.choice([None, None, 5, 20]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("is_asynchronous", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
def test_crowded_schedules_give_the_tokens_of_a_plain_loop(layers: tuple[str, ...], is_asynchronous: bool) -> None:
    """Random play rarely crowds the memory; here it always is."""
    options = {"async_scheduling": is_asynchronous}
    num_preemptions = num_hits = 0
    for seed in range(6):
        random = Random(seed)
        jobs = crowd(random, 7)
        budget = random.choice([5, 9, 40])
        stats = run_schedule(layers, jobs, random.choice([1, 2, 3]), 6, budget, is_short_of_memory=True, **options)
        num_preemptions += stats.num_preemptions
        num_hits += stats.prefix_cache_hit_tokens
    assert num_preemptions > 10 or "full" not in layers  # without pages that grow, little runs short
    assert num_hits > 10


@pytest.mark.parametrize("layers", [layers for layers in LAYERS if "full" in layers])
def test_preemption_happens_and_changes_nothing(layers: tuple[str, ...]) -> None:
    engine = make_engine(layers, max_model_len=32, kv_cache_memory_bytes=short_memory(layers, 55), max_num_seqs=3)
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    for at, prompt in enumerate(prompts):
        engine.add_request(str(at), prompt, SamplingParams(temperature=0, max_tokens=23))
    tokens = drain(engine)
    assert engine.stats().num_preemptions > 0
    assert tokens == {(str(at), 0): reference_tokens(layers, prompt, 23) for at, prompt in enumerate(prompts)}


@pytest.mark.parametrize("layers", LAYERS)
def test_a_known_prefix_is_not_computed_again(layers: tuple[str, ...]) -> None:
    """Twenty tokens in common, pages of two: whoever comes when they are known computes its own tokens only."""
    engine = make_engine(layers, page_size=2, kv_cache_memory_bytes=10_000)
    cached = []
    for at, own in enumerate(([1, 2, 3], [4, 5], [6])):
        prompt = [*STEM[:20], *own]
        engine.add_request(str(at), prompt, SamplingParams(temperature=0, max_tokens=5))
        outputs = [output for _ in range(7) for output in engine.step()]
        assert [token for output in outputs for token in output.token_ids] == reference_tokens(layers, prompt, 5)
        assert outputs[0].num_cached_tokens == outputs[-1].num_cached_tokens
        cached.append(outputs[0].num_cached_tokens)
    # Slots are known where they were kept: at the end of the first prompt's pages, then where the second parts from it.
    assert cached == ([0, 0, 20] if "slot" in layers else [0, 20, 20])
    stats = engine.stats()
    assert (stats.prefix_cache_queried_tokens, stats.prefix_cache_hit_tokens) == (66, sum(cached))


def test_prefixes_are_not_shared_across_salts_and_not_when_switched_off() -> None:
    for caches, salts, hits in ((True, ["a", "b", None], 0), (False, [None] * 3, 0), (True, ["a"] * 3, 32)):
        engine = make_engine(enable_prefix_caching=caches)
        for at, salt in enumerate(salts):
            engine.add_request(str(at), STEM[:19], GREEDY, cache_salt=salt)
            assert drain(engine)[str(at), 0] == reference_tokens(("full",), STEM[:19], 12)
        assert engine.stats().prefix_cache_hit_tokens == hits


@pytest.mark.parametrize("layers", LAYERS)
def test_crowded_schedules_with_drafts_give_the_tokens_of_a_plain_loop(layers: tuple[str, ...]) -> None:
    num_accepted = num_rejected = num_preemptions = 0
    for seed in range(4):
        random = Random(seed)
        jobs = crowd(random, 5)
        config = {"speculative_config": DRAFT_MODEL}
        stats = run_schedule(layers, jobs, random.choice([2, 3]), 6, 30, is_short_of_memory=seed % 2 == 0, **config)
        num_accepted += stats.accepted_tokens
        num_rejected += stats.draft_tokens - stats.accepted_tokens
        num_preemptions += stats.num_preemptions
    assert num_accepted > 20 and num_rejected > 20
    assert num_preemptions > 0 or "full" not in layers


def test_a_window_group_needs_bounded_pages() -> None:
    """A sequence of 1000 tokens runs in pages for a few windows."""
    engine = make_engine(
        program=toy_program(("window",), max_model_len=1000), max_model_len=1000, max_num_batched_tokens=16
    )
    assert engine.plan.groups[0].num_pages < 30
    engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=300))
    assert drain(engine)["a", 0] == reference_tokens(("window",), [1, 2, 3], 300)


def test_a_sampled_request_does_not_depend_on_its_neighbours() -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=20, n=2)
    alone = make_engine(seed=1)
    alone.add_request("a", [1, 2, 3], params)
    expected = drain(alone)
    assert expected["a", 0] != expected["a", 1], "the two sequences of a request have their own randomness"
    crowded = make_engine(seed=2, max_num_batched_tokens=6, kv_cache_memory_bytes=8 * 64, max_model_len=32)
    crowded.add_request("b", [5] * 12, SamplingParams(temperature=2.0, max_tokens=15))
    crowded.add_request("a", [1, 2, 3], params)
    crowded.add_request("c", [6] * 3, SamplingParams(temperature=0.5, seed=3, max_tokens=15))
    tokens = drain(crowded)
    assert crowded.stats().num_preemptions > 0
    assert {key: tokens[key] for key in expected} == expected


def test_the_engine_seed_makes_a_run_reproducible() -> None:
    runs = []
    for seed in (5, 5, 6):
        engine = make_engine(seed=seed)
        engine.add_request("a", [1], SamplingParams(max_tokens=20))
        runs.append(drain(engine))
    assert runs[0] == runs[1] != runs[2]


def test_end_of_sequence_stop_ids_ignore_eos_and_min_tokens() -> None:
    free = reference_tokens(("full",), [1, 2], 30)
    eos, stop = sorted(set(free), key=free.index)[3:5]
    first_eos, first_stop = free.index(eos), free.index(stop)
    program = toy_program(("full",), eos_token_ids=(eos,))

    def run(**params: Any) -> tuple[list[int], TokenOutput]:
        engine = make_engine(program=program)
        engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=30, **params))
        tokens: list[int] = []
        while engine.has_unfinished_requests():
            (last,) = engine.step()
            tokens += last.token_ids
        return tokens, last

    tokens, last = run()
    assert tokens == free[: first_eos + 1] and (last.finish_reason, last.stop_reason) == ("stop", None)
    tokens, last = run(ignore_eos=True)
    assert tokens == free and last.finish_reason == "length"
    tokens, last = run(ignore_eos=True, stop_token_ids=[stop])
    assert tokens == free[: first_stop + 1] and (last.finish_reason, last.stop_reason) == ("stop", stop)
    tokens, last = run(min_tokens=first_eos + 4)
    assert len(tokens) >= first_eos + 4 and eos not in tokens[: first_eos + 3]


def test_nan_logits_end_one_request_and_not_the_batch() -> None:
    healthy = reference_tokens(("full",), [1, 2], 12)
    poison = next(token for token in range(VOCAB) if token not in (*healthy, 1, 2))
    engine = make_engine(program=toy_program(("full",), poison=poison))
    engine.add_request("bad", [3, poison], replace(GREEDY, logprobs=2))
    engine.add_request("good", [1, 2], GREEDY)
    outputs = engine.step()
    bad = next(output for output in outputs if output.request_id == "bad")
    assert bad.finish_reason == "error" and bad.token_ids == [] and "not numbers" in str(bad.stop_reason)
    assert healthy[:1] + drain(engine)["good", 0] == healthy


def test_abort_frees_and_stays_silent() -> None:
    engine = make_engine()
    engine.add_request("a", [1, 2, 3], replace(GREEDY, n=2))
    engine.add_request("b", [1, 2, 3], GREEDY)
    engine.step()
    (aborted,) = engine.abort_request("a", 1)
    assert (aborted.request_id, aborted.index, aborted.finish_reason) == ("a", 1, "abort")
    assert engine.abort_request("a", 1) == [] and engine.abort_request("nobody") == []
    assert {(output.request_id, output.index) for output in engine.step()} == {("a", 0), ("b", 0)}
    assert [output.index for output in engine.abort_request("a")] == [0]
    engine.add_request("a", [1], GREEDY)  # the id is free again
    engine.abort_request("a")
    engine.abort_request("b")
    assert not engine.has_unfinished_requests() and engine.step() == []
    assert engine.stats().state_usage_fraction == 0


def test_the_sequences_of_a_request_compute_its_prompt_once() -> None:
    engine = make_engine(page_size=2, max_num_seqs=8)
    engine.add_request("a", STEM[:9], replace(GREEDY, n=3))
    assert {output.index for output in engine.step()} == {0} and engine.stats().num_waiting == 2
    tokens = drain(engine)
    expected = reference_tokens(("full",), STEM[:9], 12)
    assert tokens == {("a", 0): expected[1:], ("a", 1): expected, ("a", 2): expected}
    assert engine.stats().prefix_cache_hit_tokens == 2 * 8
    engine.add_request("b", STEM[:9], replace(GREEDY, n=2))
    engine.abort_request("b", 0)  # the one that the other waits for
    assert drain(engine) == {("b", 1): expected}
    engine.add_request("c", STEM[:9], replace(GREEDY, n=3))
    engine.abort_request("c", 1)
    assert drain(engine) == {("c", 0): expected, ("c", 2): expected}


def test_a_request_whose_time_is_up_ends_running_or_waiting() -> None:
    now = [0.0]
    options = EngineOptions(page_size=4, max_num_seqs=1)
    engine = Engine(toy_program(("full",)), options, 64, clock=lambda: now[0])
    engine.add_request("running", [1, 2], GREEDY, timeout_seconds=2)
    engine.add_request("waiting", [1, 2], replace(GREEDY, n=2), timeout_seconds=1.5)
    engine.add_request("patient", [1, 2], GREEDY, timeout_seconds=100)
    first = engine.step()
    now[0] = 1.6
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason, o.token_ids) for o in outputs[:2]] == [("waiting", "timeout", [])] * 2
    assert "1.5 seconds" in str(outputs[0].stop_reason)
    now[0] = 2.0
    ended, begun = engine.step()
    assert (ended.request_id, ended.finish_reason) == ("running", "timeout")
    assert begun.request_id == "patient", "what it owned is free in the same step"
    times = [output.first_scheduled_time for output in (first[0], outputs[0], ended, begun)]
    assert times == [0.0, None, 0.0, 2.0], "when each left the queue, on the engine's clock"
    assert first[0].token_ids + outputs[2].token_ids == reference_tokens(("full",), [1, 2], 2)
    engine.abort_request("patient")
    engine.add_request("patient", [1, 2], GREEDY)  # the name again, with all the time in the world
    now[0] = 1000.0
    assert len(drain(engine)["patient", 0]) == 12
    for bad in (-1.0, float("nan"), "1"):
        with pytest.raises(InvalidRequestError, match="timeout_seconds"):
            engine.add_request("a", [1], GREEDY, timeout_seconds=bad)  # type: ignore[arg-type]


def test_bad_requests_are_refused_and_leave_no_trace() -> None:
    engine = make_engine(max_model_len=16, max_queued_requests=2)
    for prompt, message in (([], "empty"), ([VOCAB], f"0 to {VOCAB - 1}"), ([0] * 16, "at most 15")):
        with pytest.raises(InvalidRequestError, match=message):
            engine.add_request("a", prompt, GREEDY)
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        engine.add_request("a", [1], replace(GREEDY, stop_token_ids=[VOCAB]))
    assert not engine.has_unfinished_requests()
    engine.add_request("a", [0] * 15, GREEDY)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add_request("a", [1], GREEDY)
    engine.add_request("b", [1], GREEDY)
    with pytest.raises(EngineOverloadedError, match="max_queued_requests is 2"):
        engine.add_request("c", [1], GREEDY)
    assert [output.finish_reason for output in engine.step()] == ["length", None]  # 15 tokens and one fill the context
    engine.add_request("c", [1], GREEDY)
    assert {key[0]: len(tokens) for key, tokens in drain(engine).items()} == {"b": 11, "c": 12}


def test_a_failing_model_stops_the_engine_with_its_cause() -> None:
    program = toy_program(("full",))
    graph = program.graphs["text"]

    def fail(*inputs: Tensor) -> Tensor:
        raise ValueError("a kernel failed")

    engine = make_engine(program=replace(program, graphs={"text": replace(graph, function=fail)}))
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(EngineDeadError, match="ValueError: a kernel failed") as caught:
        engine.step()
    assert isinstance(caught.value.__cause__, ValueError)
    for call in (engine.step, lambda: engine.add_request("b", [1], GREEDY)):
        with pytest.raises(EngineDeadError) as again:
            call()
        assert isinstance(again.value.__cause__, ValueError)


def test_stats_count() -> None:
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add_request(name, [1, 2, 3], GREEDY)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 1, 1)
    assert (stats.prompt_tokens, stats.generation_tokens) == (6, 2)
    assert (
        0 < stats.state_usage_fraction <= 1 and stats.last_step_host_seconds > 0 and stats.last_step_model_seconds > 0
    )
    drain(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.prompt_tokens, stats.generation_tokens) == (0, 0, 9, 36)


def test_a_start_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        make_engine(page_size=0)
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes gives 100 bytes"):
        make_engine(kv_cache_memory_bytes=100)
    program = toy_program(("full",))
    graph = replace(program.graphs["text"], batch_inputs=("input_ids", "page_table_window_9"))
    with pytest.raises(UnsupportedModelError, match=r"page_table_window_9.*full"):
        make_engine(program=replace(program, graphs={"text": graph}))


def test_logits_of_any_float_dtype_are_sampled() -> None:
    program = toy_program(("full",))
    graph = program.graphs["text"]

    def run(*inputs: Tensor) -> Tensor:
        return graph.function(*inputs).to(torch.bfloat16)

    engine = make_engine(program=replace(program, graphs={"text": replace(graph, function=run)}))
    engine.add_request("a", [1], SamplingParams(max_tokens=5, seed=0, logprobs=1))
    engine.add_request("b", [1], GREEDY)
    assert {key: len(tokens) for key, tokens in drain(engine).items()} == {("a", 0): 5, ("b", 0): 12}
