"""The naive engine gives the tokens of a plain loop, and the same answers and refusals as the real engine."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from autodeploy.config import EngineOptions
from autodeploy.errors import EngineDeadError, InvalidRequestError
from autodeploy.runtime.demo import DemoEngine
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import Logprob, SamplingParams
from tests.runtime.toy import VOCAB, reference_tokens, toy_program

LAYERS = [("full",), ("window",), ("slot",), ("window", "full", "slot")]
OPTIONS = EngineOptions(page_size=4, max_num_seqs=3)
Answer = tuple[list[int], list[dict[int, Logprob]], str | None, int | str | None]


def answers(engine: Any, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[tuple[str, int], Answer]:
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    got: dict[tuple[str, int], Answer] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens, logprobs, *_ = got.get((output.request_id, output.index), ([], []))
            tokens = tokens + output.token_ids
            logprobs = logprobs + (output.logprobs or [])
            got[output.request_id, output.index] = (tokens, logprobs, output.finish_reason, output.stop_reason)
    return got


@pytest.mark.parametrize("layers", LAYERS)
def test_tokens_are_those_of_a_plain_loop(layers: tuple[str, ...]) -> None:
    engine = DemoEngine(toy_program(layers), OPTIONS, max_model_len=32)
    prompts = {"a": [1], "b": list(range(17)), "c": [3, 3]}
    got = answers(engine, {name: (prompt, SamplingParams(temperature=0)) for name, prompt in prompts.items()})
    for name, prompt in prompts.items():
        assert got[name, 0][0] == reference_tokens(layers, prompt, min(16, 32 - len(prompt)))
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.prompt_tokens, stats.generation_tokens) == (
        0,
        0,
        20,
        16 + 15 + 16,
    )


def test_both_engines_give_the_same_answers() -> None:
    program = toy_program(("window", "full", "slot"), eos_token_ids=(4,), poison=19)
    requests = {
        "greedy": ([1, 2], SamplingParams(temperature=0, logprobs=2)),
        "seeded": ([3] * 9, SamplingParams(seed=5, n=2, top_p=0.9, logprobs=0, max_tokens=30)),
        "stops": ([5, 6], SamplingParams(seed=1, stop_token_ids=[1, 2, 3], min_tokens=3, max_tokens=None)),
        "penalised": ([7, 8], SamplingParams(temperature=0, repetition_penalty=1.4, presence_penalty=0.5)),
        "broken": ([1, 19], SamplingParams()),
    }
    demo = answers(DemoEngine(program, OPTIONS, 48), requests)
    assert demo == answers(Engine(program, replace(OPTIONS, max_num_batched_tokens=7), 48), requests)
    assert demo["broken", 0][0] == [] and demo["broken", 0][2] == "error"


def test_refusals_are_those_of_the_engine() -> None:
    params = SamplingParams(temperature=0)
    for prompt in ([], [VOCAB], [1] * 16, [1.0], "text"):
        messages = []
        for cls in (DemoEngine, Engine):
            with pytest.raises(InvalidRequestError) as caught:
                cls(toy_program(("full",)), OPTIONS, 16).add_request("a", prompt, params)  # type: ignore[arg-type]
            messages.append((str(caught.value), caught.value.parameter))
        assert messages[0] == messages[1]
    engine = DemoEngine(toy_program(("full",)), OPTIONS, 16)
    engine.add_request("a", [1], params)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add_request("a", [1], params)


def test_one_sequence_runs_at_a_time_in_order_and_can_be_aborted() -> None:
    engine = DemoEngine(toy_program(("full",)), OPTIONS, 16)
    params = SamplingParams(temperature=0, max_tokens=3)
    engine.add_request("late", [1], params, priority=1)
    engine.step()
    engine.add_request("soon", [1], replace(params, n=2))
    assert [engine.step()[0].request_id for _ in range(3)] == ["late", "late", "soon"]
    assert [(output.index, output.finish_reason) for output in engine.abort_request("soon", 0)] == [(0, "abort")]
    assert [engine.step()[0].index for _ in range(3)] == [1, 1, 1]
    assert not engine.has_unfinished_requests() and engine.step() == [] and engine.abort_request("soon") == []


def test_a_failing_model_loses_the_requests_and_not_the_engine() -> None:
    program = toy_program(("slot",))
    graph, broken = program.graphs["text"], [True]

    def run(*inputs: Tensor) -> Tensor:
        if broken:
            raise ValueError("a kernel failed")
        return graph.function(*inputs)

    engine = DemoEngine(replace(program, graphs={"text": replace(graph, function=run)}), OPTIONS, 16)
    engine.add_request("a", [1], SamplingParams(temperature=0))
    with pytest.raises(EngineDeadError, match="a kernel failed"):
        engine.step()
    assert not engine.has_unfinished_requests()
    broken.clear()
    assert answers(engine, {"b": ([1, 2], SamplingParams(temperature=0))})["b", 0][0] == reference_tokens(
        ("slot",), [1, 2], 14
    )
