"""Repeated steps: the tokens of steps that run anew, memory that is shared but never mixed up, and what is refused."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.build import build
from autodeploy.compile.backends import resolve_backend
from autodeploy.compile.bind import kernel_operator
from autodeploy.compile.program import Program
from autodeploy.compile.replay import MAX_SHAPES, MAX_TOKENS, Memory, Replay, record
from autodeploy.config import EngineOptions, parse_options
from autodeploy.errors import ConfigError
from autodeploy.graph.report import BuildReport
from autodeploy.kernels.cpu.linear import linear_cpu
from autodeploy.ops.linear import linear
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.engines import generated

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def program(model: torch.nn.Module, backend: str) -> Program:
    return build(model, parse_options({"device": "cpu", "compile_backend": backend, "check_isolation": False}))


def served(built: Program, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(built, EngineOptions(max_num_seqs=4, page_size=4), max_model_len=96)
    return generated(engine, prompts, GREEDY)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "jamba", "kimi_linear"])
def test_generation_gives_the_same_tokens(name: str) -> None:
    """Sequences join and leave, cross pages, and share their steps with prompts."""
    model = getattr(tiny, name)()
    prompts = tiny.prompts(7, longest=40)
    built = program(model, "replay")
    assert served(built, prompts) == served(program(model, "torch-simple"), prompts)
    replay = built.graphs["text"].function
    assert isinstance(replay, Replay)
    steps = [step for step in replay._steps.values() if step is not None]
    assert steps and all(step.tape.num_native > 10 for step in steps)
    assert "replay" not in built.report.facts


@pytest.mark.parametrize("name", ["qwen3", "bamba", "qwen3_next", "gpt_oss"])
def test_decode_steps_are_native_calls_alone(name: str) -> None:
    built = program(getattr(tiny, name)().bfloat16(), "replay")
    served(built, tiny.prompts(2))
    replay = built.graphs["text"].function
    assert isinstance(replay, Replay)
    tapes = [step.tape for step in replay._steps.values() if step is not None]
    assert tapes and all(tape.num_native > 10 and tape.num_python == 0 for tape in tapes)


def on(function: Callable[..., Tensor]) -> tuple[Replay, BuildReport]:
    report = BuildReport()
    return Replay(function, ["input_ids", "page_table_full"], report), report


def inputs(seed: int, num_tokens: int = 3, width: int = 2, num_sequences: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (1, num_tokens), generator=generator), torch.ones(
        num_sequences, width, dtype=torch.int32
    )


def count_up(ids: Tensor, table: Tensor, state: Tensor) -> Tensor:
    state.add_(ids.sum())
    wide = torch.empty(4 * MAX_TOKENS).fill_(1.0) * state
    return wide.reshape(2, -1)[:1, : ids.shape[1]] + ids + table.sum()


@pytest.mark.parametrize("num_sequences, num_runs", [(3, 1), (2, 2)])
def test_a_step_is_written_down_at_once_where_all_sequences_decode_else_at_its_second_time(
    num_sequences: int, num_runs: int
) -> None:
    calls = []

    def function(ids: Tensor, table: Tensor, state: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        return count_up(ids, table, state)

    replay, _ = on(function)
    state, expected_state = torch.zeros(()), torch.zeros(())
    kept = []
    for step in range(6):
        ids, table = inputs(step, num_sequences=num_sequences)
        kept.append((replay(ids, table, state), count_up(ids, table, expected_state)))
    assert calls == [3] * num_runs
    for result, expected in kept:  # results of earlier steps stay what they were
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state)
    replay(*inputs(0, num_tokens=MAX_TOKENS + 1), state)
    replay(*inputs(0, num_tokens=4), state)
    assert calls == [3] * num_runs + [MAX_TOKENS + 1, 4]


def test_a_page_table_is_widened_so_that_its_shape_seldom_changes() -> None:
    widths = set()

    def function(ids: Tensor, table: Tensor) -> Tensor:
        widths.add(table.shape[1])
        return table.sum()

    replay, _ = on(function)
    for width in (1, 2, 5, 16, 17, 31, 32, 33, 6):
        assert replay(*inputs(0, width=width)) == 2 * width
    assert widths == {16, 32, 64}


def test_other_states_are_recorded_anew() -> None:
    replay, _ = on(count_up)
    for _ in range(2):
        state, expected = torch.zeros(()), torch.zeros(())
        for step in range(4):
            ids, table = inputs(step)
            torch.testing.assert_close(replay(ids, table, state), count_up(ids, table, expected))
        torch.testing.assert_close(state, expected)


READS: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda ids: ids.tolist()[0][0],
    "item": lambda ids: ids.max().item(),
    "numpy": lambda ids: float(ids.numpy().max()),
    "bool": lambda ids: 1.0 if ids.sum() > 3 else 0.0,
    "int": lambda ids: int(ids[0, 0]),
    "nonzero": lambda ids: ids.nonzero().shape[0],
    "mask": lambda ids: ids[ids > 4].shape[0],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_step_that_looks_at_values_is_never_repeated(read: Callable[[Tensor], Any]) -> None:
    replay, report = on(lambda ids, table: ids * read(ids))
    for step in range(5):
        ids, table = inputs(step)
        torch.testing.assert_close(replay(ids, table), ids * read(ids))
    assert report.facts["replay"].startswith("not for steps of 3 tokens: ")


def test_indexing_by_numbers_is_repeated() -> None:
    replay, report = on(lambda ids, table: torch.arange(20.0)[ids])
    for step in range(4):
        ids, table = inputs(step)
        torch.testing.assert_close(replay(ids, table), ids.float())
    assert not report.facts and len(replay._steps) == 1


@pytest.mark.parametrize("name", ["tolist", "numpy", "item"])
def test_what_is_read_in_python_was_computed_before(name: str) -> None:
    """Native calls wait while a step is written down, but not beyond a read, nor behind one."""
    x, weight = torch.randn(1, 2, 32), torch.randn(32, 32)
    reads: dict[str, Callable[[Tensor], float]] = {
        "tolist": lambda y: sum(y[0, 0].tolist()),
        "numpy": lambda y: float(y.numpy()[0, 0].sum()),
        "item": lambda y: y[0, 0].sum().item(),
    }

    def function(given: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        first = linear(given, weight, None)
        number = reads[name](first)
        second = linear(first, weight, None)
        return second * number + reads[name](second)

    step, result = record(lambda given: function(given, linear_cpu), (x,), (), Memory())
    assert step.obstacle and step.tape.num_native >= 2
    torch.testing.assert_close(result, function(x, torch.nn.functional.linear), rtol=1e-4, atol=1e-4)


def test_native_calls_of_an_operator_are_its_own() -> None:
    x, weight = torch.randn(1, 2, 32), torch.randn(32, 32)
    operator = kernel_operator(linear, "cpu")

    def function(given: Tensor) -> Tensor:
        return operator(linear_cpu(given, weight, None), weight, None)

    step, result = record(function, (x,), (), Memory())
    assert not step.obstacle and (step.tape.num_native, step.tape.num_python) == (1, 1)
    torch.testing.assert_close(result, function(x), rtol=0, atol=0)
    torch.testing.assert_close(step.run([2 * x]), function(2 * x), rtol=0, atol=0)


def test_memory_is_as_it_was_asked_for() -> None:
    x = torch.zeros(3, 4).t()

    def function(given: Tensor) -> Tensor:
        made = [
            given.new_empty(5, 2),
            given.new_empty(2, 3, dtype=torch.int32),
            torch.empty_like(given),
            torch.empty_like(given, dtype=torch.bfloat16, memory_format=torch.contiguous_format),
            torch.empty_like(given.contiguous(), dtype=torch.int64),
            torch.empty(7, 1),
        ]
        facts = [(tuple(value.shape), value.stride(), value.dtype) for value in made]
        assert facts == [
            ((5, 2), (2, 1), torch.float32),
            ((2, 3), (3, 1), torch.int32),
            ((4, 3), (1, 4), torch.float32),
            ((4, 3), (3, 1), torch.bfloat16),
            ((4, 3), (3, 1), torch.int64),
            ((7, 1), (1, 1), torch.float32),
        ]
        assert len({value.data_ptr() for value in made}) == len(made)
        return given + 1

    memory = Memory()
    for _ in range(2):  # the second time from buffers that are there
        record(function, (x,), (), memory)


def test_operators_of_torch_between_kernels_are_repeated_natively() -> None:
    weight, table = torch.randn(8), torch.randn(20, 8)

    def function(ids: Tensor, x: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(ids, table)
        gate = torch.sigmoid(x * 0.5).to(torch.bfloat16)
        first, second = (torch.cat((rows, x), dim=-1) * torch.cat((gate, gate), dim=-1)).chunk(2, dim=-1)
        values, chosen = torch.topk(torch.softmax(first - second, dim=-1), 3)
        return torch.cat((values, torch.gather(x, 1, chosen), (x * weight.exp().neg()).mean(-1, keepdim=True)), dim=1)

    def inputs_of(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 20, (5,), generator=generator), torch.randn(5, 8, generator=generator)

    step, _ = record(function, inputs_of(0), (), Memory())
    assert not step.obstacle and step.tape.num_python == 0 and step.tape.num_native > 10
    for seed in range(5):
        torch.testing.assert_close(step.run(inputs_of(seed)), function(*inputs_of(seed)))


def test_what_follows_from_weights_alone_is_computed_once() -> None:
    weight = torch.randn(4, 4)
    memory = Memory()

    def function(x: Tensor) -> Tensor:
        return x @ weight.exp().neg()

    for _ in range(2):
        step, _ = record(function, (torch.ones(2, 4),), (), memory)
        assert (step.tape.num_native, step.tape.num_python) == (0, 1)
        torch.testing.assert_close(step.run([torch.full((2, 4), 3.0)]), function(torch.full((2, 4), 3.0)))
    assert len(memory._constants) == 2


def test_what_changes_in_place_is_no_constant() -> None:
    def function(x: Tensor) -> Tensor:
        total = torch.zeros(4)
        total += x
        return total * 2

    step, _ = record(function, (torch.ones(4),), (), Memory())
    assert not step.obstacle
    for number in (2.0, 3.0):
        torch.testing.assert_close(step.run([torch.full((4,), number)]), torch.full((4,), 2 * number))

    doubled = torch.ones(4)
    step, _ = record(lambda x: doubled.exp().add_(x), (torch.ones(4),), (), Memory())
    assert "took for constant" in step.obstacle


def test_few_shapes_are_remembered() -> None:
    replay, _ = on(lambda ids, table: ids + table.shape[0])
    for num_sequences in range(MAX_SHAPES + 5):
        replay(*inputs(0, num_sequences=num_sequences))
    assert len(replay._steps) == MAX_SHAPES


def test_memory_is_reused_when_nobody_holds_it() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(10):
            out = torch.empty_like(x)
            torch.add(x, 1, out=out)
            x = out
        return x

    memory = Memory()
    step, result = record(chain, (torch.zeros(100),), (), memory)
    assert len(memory._buffers) <= 11
    torch.testing.assert_close(result, torch.full((100,), 10.0))
    torch.testing.assert_close(step.run([torch.ones(100)]), torch.full((100,), 11.0))


def test_calls_of_other_threads_are_not_written_down() -> None:
    x, weight = torch.randn(1, 2, 32), torch.randn(16, 32)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            linear_cpu(x, weight, None)

    other = threading.Thread(target=busy)
    other.start()
    try:
        for _ in range(20):
            step, _ = record(lambda given: linear_cpu(given, weight, None), (x,), (), Memory())
            assert (step.tape.num_native, step.tape.num_python) == (1, 0)
    finally:
        stop.set()
        other.join()


def test_contradictory_inputs_of_a_repeated_step_are_an_error() -> None:
    built = program(tiny.llama(), "replay")
    engine = Engine(built, EngineOptions(), max_model_len=64)
    engine.add_request("a", [1, 2, 3], GREEDY)
    for _ in range(4):
        engine.step()
    batch = engine._batches.build({engine._scheduler.running[0]: 1}).inputs
    batch["slot_mapping_full"] = torch.tensor([2**40])
    replay = built.graphs["text"].function
    assert isinstance(replay, Replay) and any(replay._steps.values())
    for _ in range(2):
        with pytest.raises(IndexError, match="cached_attention_float32 returned fault 2"):
            built.run(batch, engine._states)
        replay._steps.clear()  # the second time the step is written down


def test_who_can_repeat_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "replay"
    assert resolve_backend("auto", torch.device("cuda", 0)) == "torch-cudagraph"
    with pytest.raises(ConfigError, match="not repeated"):
        resolve_backend("replay", torch.device("cuda", 0))
    monkeypatch.setenv("AUTODEPLOY_NATIVE", "0")
    assert resolve_backend("auto", torch.device("cpu")) == "torch-simple"
    with pytest.raises(ConfigError, match="AUTODEPLOY_NATIVE=0"):
        resolve_backend("replay", torch.device("cpu"))
