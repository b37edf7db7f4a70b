"""The delta rule in its three forms against transformers' token-by-token functions and a plain loop."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from autodeploy.ops import delta_rule

BORDERS = [0, 1, 8, 140]
BOUNDARIES = torch.tensor(BORDERS, dtype=torch.int32)


def _arguments(key_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, BORDERS[-1], heads, 8).to(dtype) for heads in (key_heads, key_heads, 4))
    return query, key, value, torch.rand(1, BORDERS[-1], 4).to(dtype)


def _close(result: Tensor, expected: Tensor) -> None:
    tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("normalise", [True, False])
def test_one_decay_per_head(key_heads: int, normalise: bool, dtype: torch.dtype) -> None:
    query, key, value, beta = _arguments(key_heads, dtype)
    key = key if normalise else key / 4
    decay = -torch.rand(1, BORDERS[-1], 4)
    eps = 1e-6 if normalise else None
    result = delta_rule.reference(query, key, value, beta, decay, 8**-0.5, eps, BOUNDARIES)
    for start, end in itertools.pairwise(BORDERS):
        q, k, v, b, g = (part[:, start:end] for part in (query, key, value, beta, decay))
        _close(
            result[:, start:end], torch_recurrent_gated_delta_rule(q, k, v, g, b, use_qk_l2norm_in_kernel=normalise)[0]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [0.1, 5.0])
def test_one_decay_per_channel(strength: float, dtype: torch.dtype) -> None:
    query, key, value, beta = _arguments(4, dtype)
    decay = -strength * torch.rand(1, BORDERS[-1], 4, 8)
    result = delta_rule.reference(query, key, value, beta, decay, 8**-0.5, 1e-6, BOUNDARIES)
    for start, end in itertools.pairwise(BORDERS):
        parts = (part[:, start:end] for part in (query, key, value, decay, beta))
        _close(
            result[:, start:end], recurrent_kimi_delta_attention(*parts, None, False, use_qk_l2norm_in_kernel=True)[0]
        )


def test_without_a_decay() -> None:
    query, key, value, beta = (part[:, :20] for part in _arguments(4, torch.float32))
    key = key / key.norm(dim=-1, keepdim=True)
    state, expected = torch.zeros(4, 8, 8), []
    for q, k, v, b in zip(query[0], key[0], value[0], beta[0], strict=True):
        seen = torch.einsum("nhv,nh->nv", state, k)
        state = state + torch.einsum("nh,nv->nhv", k, b[:, None] * (v - seen))
        expected.append(torch.einsum("nhv,nh->nv", state, q))
    _close(delta_rule.reference(query, key, value, beta, None, 1.0, None, None)[0], torch.stack(expected))
