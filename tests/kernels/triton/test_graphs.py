"""Captured steps with Triton kernels, interpreted: padding and scratch change no token.

That the kernels can be captured is tested by compiling them for tensors that have no data (`test_every_compiled.py`);
the interpreter itself reads values, so a capture here only does a work again.
"""

import pytest
import torch

from autodeploy.compile import backends
from autodeploy.compile.capture import Work
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.kernels import provider
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.transforms import pipeline
from autodeploy.transforms.lower.select_kernels import SelectKernels
from tests import tiny
from tests.captured import facts, program
from tests.engines import generated

CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.skipif(bool(provider.unavailable(CUDA)), reason=str(provider.unavailable(CUDA))),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here; tests/gpu runs graphs"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


class Again:
    """A `Capture` that repeats a work by doing it again."""

    def warm_up(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> Work:
        return work

    def used_bytes(self) -> int:
        return 0


def served(built: Program) -> list[list[int]]:
    options = EngineOptions(max_num_seqs=3, max_num_batched_tokens=12, page_size=4, kv_cache_memory_bytes=1 << 20)
    engine = Engine(built, options, max_model_len=24)
    for state in engine._states.values():
        state[0].fill_(torch.nan)
    return generated(engine, [[5, 6, 7, 8, 9], [3]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "jamba", "qwen3_next", "gpt_oss", "deepseek_v32"])
def test_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = getattr(tiny, name)()
    expected = served(program(model, "torch-simple"))
    monkeypatch.setattr(pipeline, "kernel_choice", lambda *_: SelectKernels(priority=provider.priority(CUDA)))
    monkeypatch.setattr(backends, "graph_capture", lambda device: Again)
    built = program(model, cudagraph_capture_sizes=[2, 3, 8])
    assert served(built) == expected
    found = facts(built)
    assert found["steps"].keys() == {"whole", "in pieces"} and found["not_captured"] == {}
    assert "triton" in str(built.report.kernels)
