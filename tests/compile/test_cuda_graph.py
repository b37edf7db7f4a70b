"""CUDA graphs, with a checker in the place of the device: tokens, padding, what is captured, and what is said of it."""

import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy import LLM
from autodeploy.compile import backends
from autodeploy.compile.backends import resolve_backend
from autodeploy.compile.capture import Work
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.debug.capture_checker import CaptureChecker
from autodeploy.errors import ConfigError
from autodeploy.ops.op import OPS, StepPlan
from autodeploy.runtime import states
from autodeploy.runtime.demo import DemoEngine
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.states import memory_budget, reserved_bytes
from tests import tiny
from tests.captured import capture_with_checker, facts, program
from tests.draft_heads import small_head
from tests.engines import generated

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(autouse=True)
def _checker(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_with_checker(monkeypatch)


def served(built: Program, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    values: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "page_size": 4} | options
    return generated(Engine(built, EngineOptions(**values), max_model_len=96), prompts, GREEDY)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "jamba", "qwen3_next", "kimi_linear"])
def test_generation_gives_the_same_tokens(name: str) -> None:
    """Sequences join and leave, cross pages, and share their steps with prompts."""
    model = getattr(tiny, name)()
    prompts = tiny.prompts(7, longest=40)
    built = program(model)
    assert served(built, prompts) == served(program(model, "torch-simple"), prompts)
    found = facts(built)
    assert found["not_captured"] == {} and set(found["steps"]) == {"whole", "in pieces"}
    assert found["whole_sizes"] == [1, 2, 4, 5] and found["piece_sizes"] == [8, 16, 24, 32, 48]


def test_pieces_take_whole_steps_where_an_op_is_not_capture_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides is what the kernel declares, and nothing else is left out."""
    model, prompts = tiny.qwen3(), tiny.prompts(5, longest=30)
    expected = served(program(model, "torch-simple"), prompts)
    kernels = OPS["cached_attention"].kernels
    monkeypatch.setitem(kernels, "cpu", replace(kernels["cpu"], capture_safe=False))
    built = program(model)
    assert served(built, prompts) == expected
    found = facts(built)
    assert set(found["steps"]) == {"in pieces"} and found["whole_sizes"] == []
    assert found["not_captured"] == {"whole": "not capture-safe: cached_attention by cpu"}
    assert found["piece_sizes"] == [1, 2, 4, 8, 16, 24, 32, 48]


class PlannedAttention(StepPlan):
    """Runs the step that was planned, and no other."""

    def prepare(self, batch: Mapping[str, torch.Tensor], states: Mapping[str, torch.Tensor]) -> None:
        self.borders = batch["cu_seqlens"].tolist()
        assert "model_layers_0_self_attn_key_cache" in states

    def run(self, *args: Any, **kwargs: Any) -> Any:
        arguments = OPS["cached_attention"].arguments(args, kwargs)
        assert arguments["cu_seqlens"].tolist() == self.borders
        return OPS["cached_attention"].reference(*args, **kwargs)


class Facts:
    def start(self, device: torch.device) -> PlannedAttention:
        return PlannedAttention()


def test_steps_that_are_planned_on_the_host_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny.qwen3(), tiny.prompts(5, longest=30)
    expected = served(program(model, "torch-simple"), prompts)
    kernels, shared = OPS["cached_attention"].kernels, Facts()
    planned = replace(kernels["cpu"], capture_safe=False, plan_facts=lambda inputs, **_: shared)
    monkeypatch.setitem(kernels, "cpu", planned)
    built = program(model)
    assert served(built, prompts) == expected
    assert facts(built)["steps"].keys() == {"in pieces"}


def test_coverage_is_counted_from_the_capture_on() -> None:
    built = program(tiny.llama(), check_isolation=True)
    assert facts(built)["steps"].keys() == {"no graphs: not captured for these states"}
    served(built, tiny.prompts(2))
    assert facts(built)["steps"].keys() == {"whole", "in pieces"}


def test_what_scratch_holds_reaches_nobody() -> None:
    """Padding reads the scratch page and the scratch slot, and whatever comes of it is thrown away."""
    model, prompts = tiny.jamba(), tiny.prompts(3, longest=20)
    built = program(model)
    engine = Engine(built, EngineOptions(max_num_seqs=5, max_num_batched_tokens=48, page_size=4), max_model_len=96)
    for state in engine._states.values():
        state[0].fill_(torch.nan)
    assert generated(engine, prompts, GREEDY) == served(program(model, "torch-simple"), prompts)
    found = facts(built)
    assert found["steps"]["whole"] > 5


def test_steps_that_fit_no_graph_run_call_by_call_and_the_report_says_so() -> None:
    model, prompts = tiny.llama(), tiny.prompts(6, shortest=20, longest=40)
    built = program(model, cudagraph_capture_sizes=[2, 4])
    assert served(built, prompts) == served(program(model, "torch-simple"), prompts)
    found = facts(built)
    assert (found["whole_sizes"], found["piece_sizes"]) == ([2, 4], [2, 4])
    assert found["steps"].keys() == {"whole", "no graphs: more than 4 tokens"}
    assert found["tokens"]["no graphs: more than 4 tokens"] > sum(map(len, prompts)) - 8


def test_rows_of_prompts_are_given_though_a_graph_has_no_room_for_them() -> None:
    model, prompt = tiny.llama(), tiny.prompts(1, shortest=12)[0]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=0)
    found = []
    for backend in ("torch-cudagraph", "torch-simple"):
        engine = Engine(program(model, backend), EngineOptions(max_num_batched_tokens=1), max_model_len=64)
        engine.add_request("a", prompt, params)
        (sequence,) = engine._requests["a"]
        while engine.has_unfinished_requests():
            engine.step()
        found.append(
            [entry and entry[token].logprob for token, entry in zip(prompt, sequence.prompt_logprobs, strict=True)]
        )
    assert len(found[0]) == len(prompt) and found[0][1:] == pytest.approx(found[1][1:], abs=1e-5)


def test_drafts_are_verified_in_pieces() -> None:
    model, prompts = tiny.llama(), tiny.prompts(2, longest=20)
    built, draft = program(model), program(model)
    speculation = {"method": "draft_model", "model": "given"}
    options = EngineOptions(page_size=4, max_num_seqs=3, max_num_batched_tokens=32, speculative_config=speculation)
    engine = Engine(built, options, max_model_len=96, draft=draft)
    assert generated(engine, prompts, GREEDY) == served(program(model, "torch-simple"), prompts)
    assert engine.stats().accepted_tokens > 5
    found = [facts(built), facts(draft)]
    assert found[0]["steps"]["in pieces"] > 1 and found[1]["steps"]["whole"] > 2


def test_a_draft_head_has_graphs_of_its_own() -> None:
    model, prompts = tiny.llama(), tiny.prompts(3, shortest=4, longest=20)
    speculation = {"method": "eagle", "model": small_head(model.config.hidden_size), "num_speculative_tokens": 3}
    built = program(model, speculative_config=speculation)
    found = served(built, prompts, speculative_config=speculation, max_num_seqs=3)
    assert found == served(program(model, "torch-simple"), prompts)
    of_text, of_head = facts(built), facts(built, "head")
    assert of_text["not_captured"] == of_head["not_captured"] == {}
    assert of_head["steps"].keys() == {"whole", "in pieces"}


def test_the_naive_engine_has_graphs_too() -> None:
    model, prompts = tiny.gemma3_text(), tiny.prompts(2, longest=30)
    built = program(model)
    engine = DemoEngine(built, EngineOptions(page_size=4), max_model_len=96)
    assert generated(engine, prompts, GREEDY) == served(program(model, "torch-simple"), prompts)
    found = facts(built)
    assert found["whole_sizes"] == [1] and set(found["steps"]) == {"whole", "in pieces"}


def test_a_successor_is_captured_when_it_takes_over() -> None:
    model, prompts = tiny.llama(), tiny.prompts(3)
    first, second = program(model), program(model)
    successor: Future[Program] = Future()
    options = EngineOptions(max_num_seqs=3, max_num_batched_tokens=32, page_size=4)
    engine = Engine(first, options, 96, successor)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(3)}
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, GREEDY)
    for step in range(40):
        if step == 4:
            successor.set_result(second)
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert list(tokens.values()) == served(program(model, "torch-simple"), prompts)
    assert facts(first)["steps"]["whole"] and facts(second)["steps"]["whole"]


def test_an_op_that_reads_values_is_noticed_though_it_says_that_it_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = OPS["rms_norm"].kernels

    def reads(x: torch.Tensor, *others: Any) -> Any:
        assert float(x.abs().max()) >= 0
        return OPS["rms_norm"].reference(x, *others)

    model, prompts = tiny.llama(), tiny.prompts(2)
    expected = served(program(model, "torch-simple"), prompts)
    monkeypatch.setitem(kernels, "cpu", replace(kernels["cpu"], function=reads))
    built = program(model)
    assert served(built, prompts) == expected
    found = facts(built)
    assert found["not_captured"].keys() == {"whole", "in pieces"}
    assert "gives what depends on values" in found["not_captured"]["whole"]
    assert all(how.startswith("no graphs: a device would not capture this step") for how in found["steps"])


def test_memory_of_graphs_is_left_out_of_what_states_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 1000 bytes is shared by all graphs; each size takes 10 besides. In the end the trial has none."""
    used = {"bytes": 0, "graphs": 0}
    graphs: list[weakref.ref[Work]] = []

    class Measured(CaptureChecker):
        def record(self, work: Work) -> Work:
            used["bytes"] += 1010 if used["bytes"] == 0 else 10
            super().record(work)

            def replay() -> None:
                raise AssertionError("a trial repeats nothing")

            graphs.append(weakref.ref(replay))
            return replay

        def used_bytes(self) -> int:
            used["graphs"] = sum(graph() is not None for graph in graphs)
            return used["bytes"]

    monkeypatch.setattr(backends, "graph_capture", lambda device: Measured)
    built = program(tiny.llama(), cudagraph_capture_sizes=[1, 2, 3, 4])
    monkeypatch.setattr(states, "available_bytes", lambda device: 1_000_000)
    options = EngineOptions(page_size=4, max_num_seqs=4, memory_fraction=0.5)
    budget = memory_budget(options, torch.device("cpu"), reserved_bytes(built, options, 96))
    regions = 4  # of three layers: before, between and behind attention
    assert facts(built)["reserved_bytes"] == 1000 + 4 * 10 * (1 + regions)
    assert budget == (1_000_000 - 1000 - 40 * (1 + regions)) // 2
    assert graphs and used["graphs"] == 0
    fixed = replace(options, kv_cache_memory_bytes=500_000)
    assert reserved_bytes(built, fixed, 96) == 0


def test_who_can_capture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="the device is cpu"):  # a first start must not answer by other means
        LLM(tiny.save("llama", tmp_path), device="cpu", compile_backend="torch-cudagraph")
    for backend in ("torch-cudagraph", "torch-opt"):
        with pytest.raises(ConfigError, match="capture CUDA graphs, and the device is cpu; use 'auto', or device='cu"):
            resolve_backend(backend, torch.device("cpu"))
        assert resolve_backend(backend, torch.device("cuda", 0)) == backend
    assert resolve_backend("auto", torch.device("cuda", 0)) == "torch-cudagraph"


@pytest.mark.slow
def test_compiled_regions_give_the_same_tokens() -> None:
    model, prompts = tiny.qwen3(), tiny.prompts(4, longest=30)
    built = program(model, "torch-opt")
    assert served(built, prompts) == served(program(model, "torch-simple"), prompts)
    found = facts(built)
    assert found["not_captured"] == {} and set(found["steps"]) == {"whole", "in pieces"}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.TINY)
def test_every_tiny_model(name: str) -> None:
    test_generation_gives_the_same_tokens(name)
