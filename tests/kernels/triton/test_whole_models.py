"""Whole models with Triton kernels give the logits that they give with the reference functions, strides and all."""

import pytest
import torch
from transformers import LlamaConfig

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.debug.shrink import tiny_model
from autodeploy.kernels import provider
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.transforms import pipeline
from autodeploy.transforms.lower.select_kernels import SelectKernels
from tests import tiny
from tests.engines import generated

CUDA = torch.device("cuda")
OTHERS = [name for name in tiny.TINY if name != "llama"]

pytestmark = [
    pytest.mark.skipif(bool(provider.unavailable(CUDA)), reason=str(provider.unavailable(CUDA))),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here; tests/gpu runs models"),
    # numpy says so where a sigmoid is 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def _program(name: str, priority: tuple[str, ...], patch: pytest.MonkeyPatch, **options: object) -> Program:
    patch.setattr(pipeline, "kernel_choice", lambda *_: SelectKernels(priority=priority))
    given = {"device": "cpu", "compile_backend": "torch-simple", "attn_backend": "torch", **options}
    return build(tiny.TINY[name](), parse_options(given))


def check(name: str, patch: pytest.MonkeyPatch, **options: object) -> Program:
    expected = _program(name, (), patch, **options)
    found = _program(name, provider.priority(CUDA), patch, **options)
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(2, seed=5)]
    torch.testing.assert_close(run_packed(found, rows), run_packed(expected, rows), rtol=1e-3, atol=1e-3)
    return found


def test_every_op_but_a_plain_product_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = check("llama", monkeypatch).report.kernels
    assert chosen.pop("linear").keys() == {"torch"}  # a library's product
    chosen.pop("choose_tokens", None)  # the program is for the CPU
    assert {op: set(counts) for op, counts in chosen.items()} == {
        op: {"triton"} for op in ("add_rms_norm", "cached_rope_attention", "gated_activation", "rms_norm")
    }


def test_one_launch_for_turning_and_writing_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = tiny_model(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    monkeypatch.setitem(tiny.TINY, "one layer", lambda: model)
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    limits = EngineOptions(max_num_seqs=2, max_num_batched_tokens=6, page_size=4)
    found = []
    for is_fused in (True, False):
        options = {"transforms": {"fuse_rope_attention": {"enabled": is_fused}}, "check_isolation": False}
        program = _program("one layer", provider.priority(CUDA), monkeypatch, **options)
        assert program.report.kernels.get("rope", {}) == ({} if is_fused else {"triton": 1})
        found.append(generated(Engine(program, limits, max_model_len=24), [[5, 6, 7, 8, 9, 4, 8], [3]], params))
    assert found[0] == found[1] and all(len(tokens) == 3 for tokens in found[0])


@pytest.mark.slow
def test_products_with_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("llama", monkeypatch, quantization="int8").report.kernels["quantized_linear"].keys() == {"triton"}


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "op"), [("fp8", "fp8_linear"), ("nvfp4", "nvfp4_linear")])
def test_low_precision(quantization: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value on the border of two numbers may go to either, as sums differ in their last bits."""
    options = {"quantization": quantization, "kv_cache_dtype": "fp8"}
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(2, seed=5)]
    expected = run_packed(_program("llama", (), monkeypatch, **options), rows)
    program = _program("llama", provider.priority(CUDA), monkeypatch, **options)
    found = run_packed(program, rows)
    assert {program.report.kernels[name].keys() == {"triton"} for name in (op, "cached_rope_attention")} == {True}
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 1e-3 and errors.max() < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = check(name, monkeypatch).report.kernels
    attention = [set(chosen[op]) for op in ("cached_attention", "cached_rope_attention") if op in chosen]
    assert attention and all(providers == {"triton"} for providers in attention)
