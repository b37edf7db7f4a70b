"""Experts at the interface: one node each, facts by numbers, weights in one layout, cost free of their number."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from autodeploy.build import build
from autodeploy.capture.experts import INTERFACE_NAME, GateFacts, experts_hooked, probe_gate
from autodeploy.capture.export import capture
from autodeploy.debug.packed_run import run_packed
from autodeploy.transforms.canonicalize.fold_weights import FoldWeights
from tests import tiny
from tests.graphs import Sketch, captured, counts, run

LIMITED = nn.Module()
LIMITED.limit = 7.0


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _limited(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (_swiglu, GateFacts("silu", True)),
        (_limited, GateFacts("quick_gelu", True, 7.0, 1.0, True)),
        (transformers.activations.ACT2FN["relu2"], GateFacts("relu2", False)),
        (transformers.activations.ACT2FN["gelu_pytorch_tanh"], GateFacts("gelu_tanh", False)),
    ],
)
def test_gates_are_known_by_numbers(function: Callable[[Tensor], Tensor], facts: GateFacts) -> None:
    assert probe_gate(function, LIMITED) == facts


@pytest.mark.parametrize(
    "function",
    [
        lambda gate_up: _swiglu(gate_up) * 1.01,
        lambda gate_up: _swiglu(gate_up.flip(-1)),
        lambda gate_up: _swiglu(gate_up).clamp(max=5e4),  # a limit that no attribute tells
        lambda gate_up: _swiglu(gate_up.float()).to(gate_up.dtype),  # rounds elsewhere
        lambda gate_up: gate_up @ torch.ones(7, 7),
        lambda gate_up: (gate_up, gate_up),
    ],
)
def test_near_misses_are_no_known_gate(function: Callable[[Tensor], Any]) -> None:
    assert probe_gate(function, LIMITED) is None


def _experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GptOssExperts | MixtralExperts)]


def test_the_interface_is_put_back() -> None:
    model = tiny.TINY["gpt_oss"]()
    before = model.config._experts_implementation
    with experts_hooked(model) as found:
        assert found == len(_experts_of(model)) > 0
        assert model.config._experts_implementation == INTERFACE_NAME in ExpertsInterface._global_mapping
    assert model.config._experts_implementation == before and INTERFACE_NAME not in ExpertsInterface._global_mapping


def _mixtral(num_experts: int, **fields: Any) -> PreTrainedModel:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=num_experts, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval().requires_grad_(False)


def test_capture_does_not_grow_with_the_number_of_experts() -> None:
    few, many = (capture(_mixtral(number)) for number in (8, 128))
    assert counts(few)["moe"] == counts(many)["moe"] == 2
    assert len(few.graph.nodes) == len(many.graph.nodes)


def _as_loaded(model: nn.Module) -> set[str]:
    graph = captured(model)
    FoldWeights().run(graph)
    return {
        str(recipe) for name, recipe in graph.weights.items() if "experts" in str(recipe) and "layers.0" in str(recipe)
    }


def test_experts_are_read_once_and_as_they_are_where_the_layout_is_ours() -> None:
    assert _as_loaded(_mixtral(4)) == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    transposed = _as_loaded(tiny.TINY["gpt_oss"]())
    assert len(transposed) == 4 and all(recipe.count("experts") == 1 for recipe in transposed)


@use_experts_implementation
class _OddGate(nn.Module):
    """Experts whose gate no closed form equals, with a norm after each."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 24, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 12))
        self.scale = nn.Parameter(torch.randn(12))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.tanh(gate * self.scale) * up

    def post_expert_norm(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().mean(-1, keepdim=True))

    def forward(self, *args: Any) -> Tensor:
        raise NotImplementedError("the interface's implementations stand in for it")


def _routed_experts(self: nn.Module, x: Tensor) -> Tensor:
    flat = x.view(-1, 16)
    weights, indices = self.router(flat).softmax(-1).topk(2)
    return self.experts(flat, indices, weights).view(x.shape)


KNOWS_NORMS = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters
OLDER = "this transformers has no norm behind experts to compare with: it came after 5.17"


@pytest.mark.parametrize(
    "has_norm", [False, pytest.param(True, marks=pytest.mark.skipif(not KNOWS_NORMS, reason=OLDER))]
)
def test_an_unknown_gate_stays_in_the_graph_between_two_products(has_norm: bool) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig()
    config._experts_implementation = "batched_mm"
    experts = _OddGate(config)
    experts.has_post_expert_norm = has_norm
    model = Sketch(_routed_experts, router=nn.Linear(16, 4), experts=experts)
    graph = captured(model)
    assert counts(graph)["expert_linear"] == 2 and counts(graph)["moe"] == 0
    ids = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(graph, model, [9]), model(ids), rtol=1e-4, atol=1e-4)


def test_bfloat16_experts_stay_near_float32() -> None:
    model = tiny.gpt_oss(num_experts_per_tok=5)  # all of them: rounding must not choose others
    rows = [torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)) for length in (1, 12)]
    exact = run_packed(build(model), rows)
    rounded = run_packed(build(copy.deepcopy(model).to(torch.bfloat16)), rows)
    assert (rounded - exact).abs().max() < 0.15 * exact.abs().max()
