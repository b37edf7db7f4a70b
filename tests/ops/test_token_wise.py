"""Token-wise ops against torch's and transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from autodeploy.ops import add_rms_norm, gated_activation, layer_norm, linear, rms_norm, rope
from autodeploy.ops.mlp import ACTIVATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_has_both_orders_of_rounding(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 7, 64).to(dtype), torch.randn(64).to(dtype)
    after, before = LlamaRMSNorm(64, eps=1e-5).to(dtype), Gemma3RMSNorm(64, eps=1e-5).to(dtype)
    with torch.no_grad():
        after.weight.copy_(weight)
        before.weight.copy_(weight)
        assert torch.equal(rms_norm(x, weight, 1e-5, 0.0, False), after(x))
        torch.testing.assert_close(rms_norm(x, weight, 1e-5, 1.0, True), before(x), rtol=0, atol=1e-6)


def test_add_rms_norm_is_the_sum_and_its_norm() -> None:
    x, residual, weight = torch.randn(1, 5, 32), torch.randn(1, 5, 32), torch.randn(32)
    normed, total = add_rms_norm(x, residual, weight, 1e-6, 0.0, False)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (32,), weight, 1e-6))


def test_layer_norm() -> None:
    x, weight, bias = torch.randn(1, 5, 32), torch.randn(32), torch.randn(32)
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (32,), weight, bias, 1e-5))


def test_linear() -> None:
    x, weight, bias = torch.randn(1, 5, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activation_takes_the_gate_first(name: str) -> None:
    gate, up = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    torch.testing.assert_close(gated_activation(torch.cat((gate, up), -1), name), ACTIVATIONS[name](gate) * up)


def test_rope_is_transformers_rotation() -> None:
    query, key = torch.randn(1, 6, 4, 16), torch.randn(1, 6, 2, 16)
    angle = torch.randn(1, 6, 8).repeat(1, 1, 2)
    mine = rope(query, key, angle.cos(), angle.sin())
    theirs = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), angle.cos(), angle.sin())
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b.transpose(1, 2))


def test_rope_leaves_dimensions_beyond_the_angles() -> None:
    query, key = torch.randn(1, 6, 4, 16), torch.randn(1, 6, 2, 16)
    angle = torch.randn(1, 6, 4).repeat(1, 1, 2)
    rotated, _ = rope(query, key, angle.cos(), angle.sin())
    assert torch.equal(rotated[..., 8:], query[..., 8:]) and not torch.equal(rotated[..., :8], query[..., :8])
