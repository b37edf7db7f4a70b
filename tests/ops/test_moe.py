"""Experts against transformers' own loops and plain Python ones."""

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from autodeploy.ops import expert_linear, moe
from autodeploy.ops.moe import expert_gate

NUM_EXPERTS, NUM_CHOICES = 8, 3


def _routed(num_tokens: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices and weights."""
    generator = torch.Generator().manual_seed(seed)
    scores, indices = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(NUM_CHOICES)
    return torch.randn(num_tokens, hidden, generator=generator), indices, scores


@torch.no_grad()
def _drawn(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@pytest.mark.parametrize("num_tokens", [1, 2, 65])
def test_equals_the_loop_over_gated_experts(num_tokens: int) -> None:
    config = MixtralConfig(hidden_size=24, intermediate_size=20, num_local_experts=NUM_EXPERTS, hidden_act="gelu")
    config._experts_implementation = "eager"
    experts = _drawn(MixtralExperts(config))
    x, indices, weights = _routed(num_tokens, 24)
    with torch.no_grad():
        expected = experts(x, indices, weights)
    mine = moe(x, indices, weights, experts.gate_up_proj, experts.down_proj, None, None, "gelu", True, None, 0.0)
    torch.testing.assert_close(mine, expected)


def test_equals_the_loop_over_clamped_experts_with_biases() -> None:
    config = GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=NUM_EXPERTS)
    config._experts_implementation = "eager"
    experts = _drawn(GptOssExperts(config))
    x, indices, weights = _routed(33, 24)
    x = x * 8  # far enough for the limit to bite
    with torch.no_grad():
        expected = experts(x, indices, weights)

    def apart(rows: Tensor) -> Tensor:
        return torch.cat((rows[:, ::2], rows[:, 1::2]), 1)

    gate_up, bias = apart(experts.gate_up_proj.transpose(1, 2)), apart(experts.gate_up_proj_bias)
    down = experts.down_proj.transpose(1, 2)
    facts = ("quick_gelu", True, float(experts.limit), 1.0)
    mine = moe(x, indices, weights, gate_up, down, bias, experts.down_proj_bias, *facts)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    no_limit = moe(x, indices, weights, gate_up, down, bias, experts.down_proj_bias, "quick_gelu", True, None, 1.0)
    assert not torch.allclose(no_limit, expected, rtol=1e-2), "the sample did not reach the limit"


def test_a_token_does_not_depend_on_the_others() -> None:
    x, indices, weights = _routed(40, 16)
    gate_up, down = torch.randn(NUM_EXPERTS, 24, 16), torch.randn(NUM_EXPERTS, 16, 24)
    facts = (gate_up, down, None, None, "relu2", False, None, 0.0)
    together = moe(x, indices, weights, *facts)
    alone = torch.cat([moe(x[i : i + 1], indices[i : i + 1], weights[i : i + 1], *facts) for i in range(40)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("nowhere", [NUM_EXPERTS, NUM_EXPERTS + 3, -1])
def test_choices_of_no_expert_add_nothing(nowhere: int) -> None:
    x, indices, weights = _routed(5, 16)
    gate_up, down = torch.randn(NUM_EXPERTS, 24, 16), torch.randn(NUM_EXPERTS, 16, 12)
    facts = (gate_up, down, None, torch.randn(NUM_EXPERTS, 16), "silu", True, None, 0.0)
    expected = moe(x, indices[:, :2], weights[:, :2], *facts)
    indices[:, 2] = nowhere
    torch.testing.assert_close(moe(x, indices, weights, *facts), expected)
    product = expert_linear(x[:, None], indices, gate_up, torch.ones(NUM_EXPERTS, 24))
    assert not product[:, 2].any() and product[:, :2].all()


def test_bfloat16_sums_are_not_rounded_on_the_way() -> None:
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up, down = torch.ones(3, 1, 1, dtype=torch.bfloat16), torch.ones(3, 1, 1, dtype=torch.bfloat16)
    weights = torch.tensor([[256.0, 1.0, 1.0]])  # 256 + 1 is 256 in bfloat16
    mine = moe(x, torch.tensor([[0, 1, 2]]), weights, gate_up, down, None, None, "relu", False, None, 0.0)
    assert mine.dtype == torch.bfloat16 and mine.item() == 258


@pytest.mark.parametrize("rows_each", [1, NUM_CHOICES])
def test_expert_linear_is_a_product_per_choice(rows_each: int) -> None:
    x, indices = torch.randn(7, rows_each, 12), torch.randint(0, NUM_EXPERTS, (7, NUM_CHOICES))
    weight, bias = torch.randn(NUM_EXPERTS, 9, 12), torch.randn(NUM_EXPERTS, 9)
    mine = expert_linear(x, indices, weight, bias)
    for token in range(7):
        for choice in range(NUM_CHOICES):
            expert, row = indices[token, choice], x[token, min(choice, rows_each - 1)]
            torch.testing.assert_close(mine[token, choice], weight[expert] @ row + bias[expert], rtol=1e-4, atol=1e-5)


def test_the_gate_comes_first_and_is_limited_on_one_side() -> None:
    gate, up = torch.tensor([9.0, -9.0, 1.0]), torch.tensor([5.0, -5.0, 0.5])
    mine = expert_gate(torch.cat((gate, up)), "relu", True, 2.0, 1.0)
    assert mine.tolist() == [2 * 3, 0, 1.5]
    negative = expert_gate(torch.cat((gate, up)), "sigmoid", True, 2.0, 0.0)
    torch.testing.assert_close(negative[1], torch.sigmoid(torch.tensor(-9.0)) * -2)
