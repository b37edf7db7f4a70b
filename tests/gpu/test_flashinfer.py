"""FlashInfer on CUDA, where it is installed: the logits and tokens of the Triton kernels, one plan a step."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.kernels import flashinfer
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.engines import generated

WHY_NOT = flashinfer.why_unavailable()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
    pytest.mark.skipif(WHY_NOT is not None, reason=f"nothing of this file was tested here: {WHY_NOT}"),
]

SIZES = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}


def program(backend: str) -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=128, vocab_size=256, num_hidden_layers=3)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return build(model, parse_options({"device": "cuda", "attn_backend": backend, "compile_backend": "torch-simple"}))


def test_prompts_give_the_logits_of_triton() -> None:
    built = program("flashinfer")
    assert built.report.kernels["cached_attention"] == {"flashinfer": 3} and len(built.graphs["text"].plans) == 1
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(4, seed=5)]
    torch.testing.assert_close(run_packed(built, rows), run_packed(program("triton"), rows), rtol=0.05, atol=0.05)


def test_serves_mixed_steps() -> None:
    engine = Engine(program("flashinfer"), EngineOptions(max_num_batched_tokens=24, page_size=16), max_model_len=96)
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    assert [len(tokens) for tokens in generated(engine, tiny.prompts(6, seed=6), params)] == [10] * 6
