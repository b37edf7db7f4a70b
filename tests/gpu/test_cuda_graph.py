"""CUDA graphs on a device: the tokens of a run call by call, whole steps and pieces, and memory that was foreseen.

Run it with `make test-gpu`. It skips, and says so, where there is no CUDA device; `tests/compile/test_cuda_graph.py`
runs the same code there, with a checker in the place of the device.
"""

import gc
import os
from typing import Any

import pytest
import torch

from autodeploy.build import build
from autodeploy.compile import whole_graphs
from autodeploy.compile.capture import CudaCapture
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.check import check
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.states import batch_limits
from tests import tiny
from tests.captured import facts
from tests.engines import generated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OTHERS = ("jamba", "bamba", "qwen3_next", "kimi_linear", "deepseek_v3", "deepseek_v32")
"""Recurrent mixers, and attention to latents and to chosen tokens."""


def program(name: str, backend: str, **options: object) -> Program:
    values = {"device": "cuda", "compile_backend": backend, "check_isolation": False, **options}
    return build(getattr(tiny, name)(), parse_options(values))


def served(built: Program, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    values: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "page_size": 4} | options
    return generated(Engine(built, EngineOptions(**values), max_model_len=96), prompts, GREEDY)


@pytest.mark.parametrize("name", [*tiny.TINY, *OTHERS])
def test_graphs_give_the_tokens_of_single_calls(name: str) -> None:
    prompts = tiny.prompts(7, longest=40)
    built = program(name, "torch-cudagraph")
    assert served(built, prompts) == served(program(name, "torch-simple"), prompts)
    found = facts(built)
    assert found["not_captured"] == {} and found["steps"].keys() == {"whole", "in pieces"}


@pytest.mark.parametrize("name", ["qwen3", "jamba"])
def test_graphs_of_compiled_pieces_do_too(name: str) -> None:
    prompts = tiny.prompts(7, longest=40)
    built = program(name, "torch-opt")
    assert served(built, prompts) == served(program(name, "torch-simple"), prompts)
    assert facts(built)["not_captured"] == {}


def test_steps_in_flight_change_nothing() -> None:
    prompts = tiny.prompts(9, longest=30)
    found = [
        served(program("llama", "torch-cudagraph"), prompts, async_scheduling=is_asynchronous)
        for is_asynchronous in (True, False)
    ]
    assert found[0] == found[1] == served(program("llama", "torch-simple"), prompts)


def test_what_scratch_holds_reaches_nobody() -> None:
    prompts = tiny.prompts(3, longest=20)
    options = EngineOptions(max_num_seqs=5, max_num_batched_tokens=48, page_size=4)
    engine = Engine(program("jamba", "torch-cudagraph"), options, max_model_len=96)
    for state in engine._states.values():
        state[0].fill_(torch.nan)
    assert generated(engine, prompts, GREEDY) == served(program("jamba", "torch-simple"), prompts)


def test_an_engine_may_be_followed_by_another() -> None:
    prompts, built = tiny.prompts(4), program("llama", "torch-cudagraph")
    first = served(built, prompts)
    gc.collect()
    assert served(built, prompts) == first


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other processes take memory of the device meanwhile")
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_memory_of_graphs_was_foreseen(name: str) -> None:
    """Also where each size is captured twice, as a second stream is tried."""
    mark = {"assign_streams": {"enabled": True, "least_bytes": 1000}} if name == "qwen2_moe" else {}
    built = program(name, "torch-cudagraph", transforms=mark)
    options = EngineOptions(max_num_seqs=32, max_num_batched_tokens=512)
    reserved = built.reserved_bytes(batch_limits(options, 32, 256))
    Engine(built, options, max_model_len=256)
    found = facts(built)
    assert reserved > 0 and found["bytes"] <= 1.25 * reserved + (64 << 20)
    assert bool(found["streams"]) == bool(mark)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("is_wanted", [True, False], ids=["always", "where faster"])
def test_branches_on_a_second_stream_give_the_same_tokens(
    name: str, is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_wanted:
        monkeypatch.setattr(whole_graphs, "_FASTER", float("inf"))
    prompts, mark = tiny.prompts(7, longest=40), {"assign_streams": {"enabled": True, "least_bytes": 1000}}
    built = program(name, "torch-cudagraph", transforms=mark)
    assert served(built, prompts) == served(program(name, "torch-simple"), prompts)
    found = facts(built)
    assert found["not_captured"] == {} and found["streams"].keys() == set(found["whole_sizes"])
    assert all(entry["used"] for entry in found["streams"].values()) or not is_wanted
    assert not any("why_not" in entry for entry in found["streams"].values())


def test_what_reads_values_is_refused_and_the_device_goes_on() -> None:
    capture, x = CudaCapture(torch.device("cuda", 0)), torch.ones(4, device="cuda")

    def reads() -> None:
        x.add_(float(x.sum()))

    def doubles() -> None:
        x.mul_(2)

    with pytest.raises(RuntimeError):
        capture.record(reads)
    assert capture.used_bytes() > 0  # which empties the caches of an allocator that knows of no capture
    assert torch.randn(4, device="cuda").isfinite().all()
    replay = capture.record(doubles)
    x.fill_(3.0)
    replay()
    assert x.tolist() == [6.0] * 4


def test_a_check_compares_backends() -> None:
    report = check(tiny.llama(), parse_options({"device": "cuda"}))
    assert report.passed
    rows = {row.name: row for row in report.rows if row.stage == "generate"}
    assert list(rows) == ["torch-simple", "torch-compile", "torch-cudagraph", "torch-opt"]
    assert all(row.verdict == "passed" for row in rows.values())
    assert all("15 of 15 tokens chosen in graphs" in rows[name].note for name in ("torch-cudagraph", "torch-opt"))
