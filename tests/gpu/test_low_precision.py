"""Low precision on CUDA: kernels against their ops, whole models against the CPU's references.

Run it with `make test-gpu`. It skips, and says so, where there is no CUDA device.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.kernels import provider
from autodeploy.ops import OPS
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.engines import generated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
]


@pytest.fixture(autouse=True, scope="module")
def _needs_float8() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no 8-bit floating point")


def _moved(sample: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    def moved(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        is_converted = value.dtype == torch.float32 and not name.endswith(("scales", "scale"))
        return value.to(device, dtype if is_converted else value.dtype)

    return {name: moved(name, value) for name, value in sample.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fp8_linear", "fp8_moe", "nvfp4_linear", "nvfp4_moe"])
def test_kernels_give_what_their_ops_give(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    provider.priority(torch.device("cuda"))
    op = OPS[name]
    assert op.samples is not None
    for sample in op.samples():
        given = _moved(sample, dtype, "cuda")
        assert op.kernels["triton"].supports(**given) is None
        found = op.kernels["triton"].function(**given).cpu()
        expected = op.reference(**_moved(sample, dtype, "cpu"))
        tolerance = op.tolerance[dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("block_size", [None, 128])
def test_products_of_real_sizes(rows: int, block_size: int | None, dtype: torch.dtype) -> None:
    """Whole sizes, for which a scale per row goes to the library and scales of blocks to Triton."""
    from autodeploy.checkpoint.quantize import Float8Format

    torch.manual_seed(0)
    provider.priority(torch.device("cuda"))
    parts = Float8Format(block_size).quantize(torch.randn(1536, 2048, device="cuda") * 2048**-0.5, None)
    x, bias = torch.randn(rows, 2048, device="cuda").to(dtype), torch.randn(1536, device="cuda").to(dtype)
    arguments = (x, parts["numbers"], parts["scales"], bias, block_size)
    op = OPS["fp8_linear"]
    found, expected = op.kernels["triton"].function(*arguments), op.reference(*arguments)
    torch.testing.assert_close(found, expected, rtol=op.tolerance[dtype], atol=op.tolerance[dtype])


def _model(mixture: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    fields: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    if mixture:
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **fields)).eval().requires_grad_(False)
    return LlamaForCausalLM(LlamaConfig(**fields)).eval().requires_grad_(False)


def _program(device: str, mixture: bool = False, **options: object) -> Program:
    return build(_model(mixture), parse_options({"device": device, **options}))


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("quantization", "op", "mixture"),
    [
        ("fp8", "fp8_linear", False),
        ("fp8_per_block", "fp8_linear", False),
        ("nvfp4", "nvfp4_linear", False),
        ("fp8", "fp8_moe", True),
        ("fp8_per_block", "fp8_moe", True),
        ("nvfp4", "nvfp4_moe", True),
    ],
)
def test_models_give_the_references_logits(quantization: str, op: str, mixture: bool) -> None:
    here, there = (_program(device, mixture, quantization=quantization) for device in ("cpu", "cuda"))
    assert there.report.kernels[op].keys() == {"triton"}, there.report.kernel_reasons
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=5)]
    assert _distance(run_packed(there, rows), run_packed(here, rows)) < 0.03


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_keys_and_values_in_8_bits(dtype: str) -> None:
    whole, rounded = _program("cuda"), _program("cuda", kv_cache_dtype=dtype)
    assert rounded.report.kernels["cached_rope_attention"].keys() == {"triton"}, rounded.report.kernel_reasons
    assert 4 * sum(s.dtype.itemsize for s in rounded.states) == sum(s.dtype.itemsize for s in whole.states)
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=5)]
    found = run_packed(rounded, rows)
    assert _distance(found, run_packed(_program("cpu", kv_cache_dtype=dtype), rows)) < 0.02
    assert 0 < _distance(found, run_packed(whole, rows)) < 0.2


def test_latents_in_8_bits() -> None:
    options = parse_options({"device": "cuda", "kv_cache_dtype": "fp8"})
    program = build(tiny.HYBRID["kimi_linear"](), options)
    assert program.report.kernels["cached_mla"].keys() == {"triton"}, program.report.kernel_reasons
    here = build(tiny.HYBRID["kimi_linear"](), parse_options({"device": "cpu", "kv_cache_dtype": "fp8"}))
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=5)]
    assert _distance(run_packed(program, rows), run_packed(here, rows)) < 0.02


def test_everything_at_once_generates_the_same_tokens_in_the_same_steps() -> None:
    program = _program("cuda", quantization="fp8", kv_cache_dtype="fp8")
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)

    def tokens() -> list[list[int]]:
        engine = Engine(program, EngineOptions(max_num_batched_tokens=24, page_size=4), max_model_len=96)
        return generated(engine, tiny.prompts(6, seed=6), params)

    first = tokens()
    assert all(len(each) == 10 for each in first) and tokens() == first
