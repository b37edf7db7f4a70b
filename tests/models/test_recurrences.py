"""Architectures whose recurrences are Python loops over tokens: served without a patch or an op of their name."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.debug.packed_run import run_packed
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.engines import generated

VOCAB = 96
CROWDED = EngineOptions(max_num_batched_tokens=16, page_size=4, max_num_seqs=6)


def rwkv() -> PreTrainedModel:
    """Time mixing and the WKV recurrence; weights that the first forward pass rescales in place."""
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, rescale_every=2, context_length=256
    )
    return transformers.RwkvForCausalLM(config)


def recurrent_gemma() -> PreTrainedModel:
    """Gated linear recurrences after depthwise convolutions, and local attention; state kept on modules."""
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        lru_width=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=64,
        sliding_window=12,
    )
    return transformers.RecurrentGemmaForCausalLM(config)


def minimax() -> PreTrainedModel:
    """Linear attention with a decay per head in blocks, a cache class of its own, experts."""
    config = transformers.MiniMaxConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_local_experts=4,
        block_size=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    return transformers.MiniMaxForCausalLM(config)


def zaya() -> PreTrainedModel:
    """Queries and keys through two convolutions on one padding, values of the token before, windows, experts."""
    config = transformers.ZayaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        router_hidden_size=16,
        sliding_window=6,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
    )
    return transformers.ZayaForCausalLM(config)


def xlstm() -> PreTrainedModel:
    """A matrix memory with exponential gates, run in chunks and steps."""
    config = transformers.xLSTMConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=4, chunk_size=8, ffn_round_up_to_multiple_of=8
    )
    return transformers.xLSTMForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, int]]] = {
    "rwkv": (rwkv, {"roll_loops": 3, "match_recurrences": 3, "match_token_shift": 6}),
    "minimax": (minimax, {"roll_loops": 2, "match_recurrences": 2, "match_attention": 1}),
    "xlstm": (xlstm, {"match_linear": 21, "insert_cached_ops": 2}),
    "zaya": (zaya, {"match_token_shift": 3, "match_causal_conv": 6, "match_attention": 3}),
    "recurrent_gemma": (
        recurrent_gemma,
        {"roll_loops": 2, "match_recurrences": 2, "match_causal_conv": 2, "match_attention": 1},
    ),
}


def _tiny(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.shape[:-1].numel() == 1:
                parameter += 0.1 * noise
            else:
                parameter.copy_(0.3 * noise)
    return model


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def _greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Everything again for every token: what the caches of the program are compared with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def _served(program: Program, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens from an engine with too little room: chunked prompts, decode, preemption."""
    engine = Engine(program, CROWDED, max_model_len=96)
    return generated(engine, prompts, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))


@pytest.mark.parametrize("name", MODELS)
def test_serves_what_the_model_computes(name: str) -> None:
    make, rewrites = MODELS[name]
    model = _tiny(make)
    program = build(model)
    assert not any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    assert program.report.facts["isolation"] == "passed"
    assert {key: program.report.rewrites()[key] for key in rewrites} == rewrites
    prompts = [[token % VOCAB for token in prompt] for prompt in tiny.prompts(6, seed=1, longest=30)]
    packed = run_packed(program, [torch.tensor(prompt) for prompt in prompts[:3]])
    alone = torch.cat([_logits(model, torch.tensor([prompt]))[0] for prompt in prompts[:3]])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert _served(program, prompts, 8) == [_greedy(model, prompt, 8) for prompt in prompts]
