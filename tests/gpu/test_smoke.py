"""A first smoke suite on CUDA: the same graph and the same tokens as on the CPU, with the reference kernels.

Run it with `make test-gpu`, from a bare checkout with the packages a GPU machine has. It skips, and says so,
where there is no CUDA device.
"""

import pytest
import torch

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.engines import generated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
]


def _program(name: str, device: str, **options: object) -> Program:
    return build(tiny.TINY[name](), parse_options({"device": device, **options}))


def _generate(program: Program, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    engine = Engine(program, EngineOptions(max_num_batched_tokens=24, page_size=4), max_model_len=96)
    return generated(engine, prompts, params)


@pytest.mark.parametrize("name", tiny.TINY)
def test_same_graph_and_same_logits_as_on_the_cpu(name: str) -> None:
    here, there = _program(name, "cpu"), _program(name, "cuda")
    assert there.device.type == "cuda" and there.report.facts["isolation"] == "passed"
    expected, found = here.report.rewrites(), there.report.rewrites()
    assert found.pop("fuse_rope_attention") == here.report.kernels.get("rope", {}).get("cpu", 0)
    del expected["place_on_device"], found["place_on_device"], expected["fuse_rope_attention"]
    assert found == expected
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=5)]
    torch.testing.assert_close(run_packed(there, rows), run_packed(here, rows), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch-simple", "torch-compile"])
def test_generates_the_cpus_tokens(backend: str) -> None:
    prompts = tiny.prompts(6, seed=6)
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    expected = _generate(_program("llama", "cpu"), prompts, greedy)
    assert _generate(_program("llama", "cuda", compile_backend=backend), prompts, greedy) == expected


def test_seeded_sampling_draws_the_same_numbers_as_on_the_cpu() -> None:
    prompts = tiny.prompts(4, seed=7)
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=1, max_tokens=10, ignore_eos=True)
    expected = _generate(_program("qwen3", "cpu"), prompts, params)
    assert _generate(_program("qwen3", "cuda"), prompts, params) == expected


def test_bfloat16_runs_and_is_near_float32() -> None:
    exact = _program("llama", "cuda")
    rough = build(tiny.TINY["llama"]().to(torch.bfloat16), parse_options({"device": "cuda"}))
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=8)]
    expected, found = run_packed(exact, rows), run_packed(rough, rows)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
