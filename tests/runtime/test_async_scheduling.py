"""A step launched before the last one's tokens are read gives the tokens of the plain loop, whatever is asked for."""

from concurrent.futures import Future
from dataclasses import replace
from random import Random
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.request import SamplingParams, TokenOutput
from autodeploy.runtime.structured_outputs import StructuredOutputsParams
from tests.runtime.toy import VOCAB, reference_tokens, toy_program

GREEDY = SamplingParams(temperature=0, max_tokens=12)
GUIDED = replace(GREEDY, structured_outputs=StructuredOutputsParams(regex=".*"))
STEM = Random(1).choices(range(VOCAB), k=16)
LAYERS = [("full",), ("slot", "full", "window"), ("full", "window", "slot")]

Key = tuple[str, int]


class Alternating:
    """A stand-in for grammars: a token is followed by one of another remainder modulo three."""

    problem = None

    def __init__(self) -> None:
        self._last = 0

    def matcher(self, _: StructuredOutputsParams) -> "Alternating":
        return Alternating()

    def follow(self, token_ids: list[int]) -> None:
        self._last = token_ids[-1] if token_ids else 0

    def allowed(self) -> NDArray[np.bool_]:
        return np.arange(VOCAB) % 3 != self._last % 3

    def allows(self, token_id: int) -> bool:
        return bool(self.allowed()[token_id])


def make_engine(program: Program, is_asynchronous: bool, **options: Any) -> Engine:
    chosen = EngineOptions(**{"page_size": 2, "seed": 3, "async_scheduling": is_asynchronous, **options})
    return Engine(program, chosen, 48, grammars=cast(GrammarCompiler, Alternating()))


def run_to_end(engine: Engine) -> dict[Key, TokenOutput]:
    """What each sequence got, all its outputs in one."""
    got: dict[Key, TokenOutput] = {}
    while engine.has_unfinished_requests():
        add_outputs(got, engine.step())
        assert engine.stats().num_steps < 3000, "no end in sight"
    assert engine.stats().state_usage_fraction == 0
    return got


def add_outputs(got: dict[Key, TokenOutput], outputs: list[TokenOutput]) -> None:
    for output in outputs:
        before = got.setdefault((output.request_id, output.index), output)
        if before is not output:
            assert before.finish_reason is None, "output after the end"
            before.token_ids += output.token_ids
            if before.logprobs is not None and output.logprobs is not None:
                before.logprobs += output.logprobs
            before.finish_reason, before.stop_reason = output.finish_reason, output.stop_reason


def random_params(random: Random) -> SamplingParams:
    """Some of everything that a request may ask for."""
    given: dict[str, Any] = {"max_tokens": random.randint(1, 25), "temperature": random.choice([0, 0, 0.05, 1.0])}
    choices: dict[str, list[Any]] = {
        "n": [2],
        "seed": [random.randrange(9)],
        "top_p": [0.5, 0.95],
        "top_k": [2, 8],
        "min_p": [0.1],
        "repetition_penalty": [1.05],
        "presence_penalty": [0.02],
        "frequency_penalty": [0.03],
        "logprobs": [0, 3],
        "prompt_logprobs": [1],
        "stop_token_ids": [random.choices(range(VOCAB), k=2)],
        "logit_bias": [{random.randrange(VOCAB): 0.1}],
        "allowed_token_ids": [random.choices(range(VOCAB), k=12)],
        "bad_token_sequences": [[[random.randrange(VOCAB)]], [[random.randrange(VOCAB), random.randrange(VOCAB)]]],
        "ignore_eos": [True],
        "min_tokens": [random.randint(0, given["max_tokens"])],
    }
    for name, values in choices.items():
        if random.random() < 0.2:
            given[name] = random.choice(values)
    if random.random() < 0.15:
        given = {name: given[name] for name in given if name not in ("ignore_eos", "min_tokens", "allowed_token_ids")}
        given["structured_outputs"] = StructuredOutputsParams(regex=".*")
    return SamplingParams(**given)


def run_crowd(layers: tuple[str, ...], seed: int, *, is_asynchronous: bool) -> tuple[dict[Key, TokenOutput], Engine]:
    random = Random(seed)
    num_bytes = 8 * 70 * sum(layer != "slot" for layer in layers) + 8 * 14 * layers.count("slot")
    program = toy_program(layers, eos_token_ids=(3,))
    budget = random.choice([6, 9, 40])
    engine = make_engine(
        program, is_asynchronous, max_num_seqs=6, max_num_batched_tokens=budget, kv_cache_memory_bytes=num_bytes
    )
    got: dict[Key, TokenOutput] = {}
    for at in range(9):
        prompt = STEM[: random.choice([0, 6, 13])] + random.choices(range(VOCAB), k=random.randint(1, 9))
        engine.add_request(str(at), prompt, random_params(random), priority=random.randrange(2))
        for _ in range(random.randrange(3)):
            add_outputs(got, engine.step())
    while engine.has_unfinished_requests():
        add_outputs(got, engine.step())
        assert engine.stats().num_steps < 3000, "no end in sight"
    return got, engine


@pytest.mark.parametrize("layers", LAYERS)
def test_a_crowd_that_asks_for_everything_gets_what_the_plain_loop_gives(layers: tuple[str, ...]) -> None:
    num_overlapped = num_plain = num_preemptions = 0
    for seed in range(8):
        plain, _ = run_crowd(layers, seed, is_asynchronous=False)
        overlapped, engine = run_crowd(layers, seed, is_asynchronous=True)
        for output in (*plain.values(), *overlapped.values()):
            output.num_cached_tokens, output.first_scheduled_time = 0, None  # they depend on who came when
        assert overlapped == plain
        stats = engine.stats()
        assert stats.state_usage_fraction == 0 and stats.num_running == stats.num_waiting == 0
        assert stats.generation_tokens == sum(len(output.token_ids) for output in plain.values())
        num_overlapped += stats.num_overlapped_steps
        num_plain += stats.num_steps - stats.num_overlapped_steps
        num_preemptions += stats.num_preemptions
    assert num_overlapped > 50 and num_plain > 20
    assert num_preemptions > 5


def test_the_next_step_is_launched_before_the_tokens_are_out() -> None:
    engine = make_engine(toy_program(("full",)), True)
    engine.add_request("a", [1, 2], GREEDY)
    tokens = [[token for output in engine.step() for token in output.token_ids] for _ in range(13)]
    assert tokens == [[], *([token] for token in reference_tokens(("full",), [1, 2], 12))]
    assert not engine.has_unfinished_requests() and engine.step() == []
    assert (engine.stats().num_steps, engine.stats().num_overlapped_steps) == (12, 11)


@pytest.mark.parametrize(
    ("params", "options"),
    [
        (GUIDED, {}),
        (replace(GREEDY, bad_token_sequences=[[1, 2]]), {}),
        (GREEDY, {"speculative_config": {"prompt_lookup_min": 1}}),
        (GREEDY, {"async_scheduling": None}),
    ],
)
def test_what_needs_its_tokens_on_the_host_is_not_overlapped(params: SamplingParams, options: dict[str, Any]) -> None:
    """Nor is anything on a CPU, unless it is asked for."""
    engine = make_engine(toy_program(("full",)), True, **options)
    engine.add_request("a", [1, 2], params)
    assert len(run_to_end(engine)["a", 0].token_ids) == 12
    assert engine.stats().num_overlapped_steps == 0


def test_a_token_behind_the_end_is_thrown_away_and_the_pages_are_free_at_once() -> None:
    free = reference_tokens(("full",), [1, 2], 12)
    stop = next(token for at, token in enumerate(free) if at > 3 and token not in free[:at])
    engine = make_engine(toy_program(("full",)), True)
    engine.add_request("a", [1, 2], replace(GREEDY, stop_token_ids=[stop]))
    engine.add_request("b", [1, 2, 3], GREEDY)
    got: dict[Key, TokenOutput] = {}
    while ("a", 0) not in got or got["a", 0].finish_reason is None:
        add_outputs(got, engine.step())
    assert got["a", 0].token_ids == free[: free.index(stop) + 1]
    assert (engine.stats().num_running, got["a", 0].stop_reason) == (1, stop)
    add_outputs(got, run_to_end(engine).values())
    assert got["b", 0].token_ids == reference_tokens(("full",), [1, 2, 3], 12)
    assert engine.stats().generation_tokens == free.index(stop) + 1 + 12


def test_nobody_loses_pages_to_a_token_that_is_not_wanted() -> None:
    """There is room for sixteen tokens. Both sequences have eight when their last token is being sampled."""
    options = EngineOptions(page_size=1, kv_cache_memory_bytes=8 * 17, max_num_seqs=2, async_scheduling=True)
    engine = Engine(toy_program(("full",)), options, 16)
    prompts = {"a": [1, 2, 3, 4, 5], "b": [2, 2, 3, 4, 5]}
    expected = {name: reference_tokens(("full",), prompt, 4) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        assert expected[name][3] not in expected[name][:3]
        engine.add_request(name, prompt, replace(GREEDY, stop_token_ids=expected[name][3:]))
    got = run_to_end(engine)
    assert {name: got[name, 0].token_ids for name in prompts} == expected
    stats = engine.stats()
    assert (stats.num_steps, stats.num_overlapped_steps, stats.num_preemptions) == (4, 3, 0)


def test_aborted_in_flight_a_request_is_silent_and_its_name_is_free() -> None:
    engine = make_engine(toy_program(("full",)), True)
    engine.add_request("a", [1, 2], GREEDY)
    engine.add_request("b", [1, 2, 3], GREEDY)
    engine.step()
    engine.step()
    (aborted,) = engine.abort_request("a")
    assert aborted.finish_reason == "abort" and engine.stats().num_running == 1
    engine.add_request("a", [4], GREEDY)
    got = run_to_end(engine)
    assert got["a", 0].token_ids == reference_tokens(("full",), [4], 12)
    assert got["b", 0].token_ids == reference_tokens(("full",), [1, 2, 3], 12)[1:]


def test_what_was_sampled_before_a_timeout_comes_out_before_it() -> None:
    now = [0.0]
    options = EngineOptions(page_size=4, async_scheduling=True)
    engine = Engine(toy_program(("full",)), options, 48, clock=lambda: now[0])
    engine.add_request("a", [1, 2], GREEDY, timeout_seconds=1.0)
    assert engine.step() == []
    now[0] = 1.0
    first, second = engine.step()
    assert (first.token_ids, first.finish_reason) == (reference_tokens(("full",), [1, 2], 1), None)
    assert (second.token_ids, second.finish_reason) == ([], "timeout")
    assert not engine.has_unfinished_requests() and engine.stats().state_usage_fraction == 0


def test_unusable_logits_end_one_request_and_not_the_batch() -> None:
    healthy = reference_tokens(("full",), [1, 2], 12)
    poison = next(token for token in range(VOCAB) if token not in (*healthy, 1, 2))
    engine = make_engine(toy_program(("full",), poison=poison), True)
    engine.add_request("bad", [3, poison], replace(GREEDY, logprobs=2))
    engine.add_request("good", [1, 2], GREEDY)
    got = run_to_end(engine)
    assert (got["bad", 0].token_ids, got["bad", 0].finish_reason) == ([], "error")
    assert "not numbers" in str(got["bad", 0].stop_reason)
    assert got["good", 0].token_ids == healthy


def test_a_successor_takes_over_behind_the_step_in_flight() -> None:
    successor: Future[Program] = Future()
    options = EngineOptions(page_size=2, async_scheduling=True)
    engine = Engine(toy_program(("full",)), options, 48, successor)
    engine.add_request("a", [1, 2], GREEDY)
    got: dict[Key, TokenOutput] = {}
    for at in range(20):
        if at == 4:
            successor.set_result(toy_program(("full",)))
        add_outputs(got, engine.step())
    assert got["a", 0].token_ids == reference_tokens(("full",), [1, 2], 12)


def test_a_model_that_fails_in_a_later_step_stops_the_engine() -> None:
    program = toy_program(("full",))
    graph = program.graphs["text"]
    calls: list[int] = []

    def fail_at_last(*inputs: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a kernel failed")
        return cast(Tensor, graph.function(*inputs))

    engine = make_engine(replace(program, graphs={"text": replace(graph, function=fail_at_last)}), True)
    engine.add_request("a", [1], GREEDY)
    engine.step()
    engine.step()
    with pytest.raises(Exception, match="ValueError: a kernel failed"):
        engine.step()
