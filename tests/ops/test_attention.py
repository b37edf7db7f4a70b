"""Attention against torch's own, fact by fact."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops import attention
from autodeploy.ops.attention import visible_keys

LENGTHS = [1, 9, 14]


def _inputs(num_heads: int = 4, num_kv_heads: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return {
        "query": torch.randn(1, total, num_heads, 16, generator=generator),
        "key": torch.randn(1, total, num_kv_heads, 16, generator=generator),
        "value": torch.randn(1, total, num_kv_heads, 16, generator=generator),
        "cu_seqlens": torch.tensor([0, 1, 10, 24], dtype=torch.int32),
        "sinks": None,
        "scale": 0.3,
        "causal": True,
        "sliding_window": None,
        "chunk_size": None,
        "softcap": None,
        "slopes": None,
        "distance_logits": None,
    }


def _torch_attention(inputs: dict[str, Any], mask_of: Any) -> Tensor:
    """Each sequence alone through scaled_dot_product_attention with a mask built here."""
    outputs = []
    for a, b in zip([0, 1, 10], [1, 10, 24], strict=True):
        q, k, v = (inputs[name][:, a:b].transpose(1, 2) for name in ("query", "key", "value"))
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)[None]
        mask = mask_of(i, j)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=inputs["scale"], enable_gqa=True)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    ("facts", "mask_of"),
    [
        ({}, lambda i, j: j <= i),
        ({"causal": False}, lambda i, j: (i >= 0) & (j >= 0)),
        ({"sliding_window": 4}, lambda i, j: (j <= i) & (i - j < 4)),
        ({"chunk_size": 5}, lambda i, j: (j <= i) & (i // 5 == j // 5)),
        ({"sliding_window": 3, "chunk_size": 5}, lambda i, j: (j <= i) & (i - j < 3) & (i // 5 == j // 5)),
    ],
)
def test_masks_as_facts(facts: dict[str, Any], mask_of: Any) -> None:
    inputs = _inputs() | facts
    torch.testing.assert_close(attention(**inputs), _torch_attention(inputs, mask_of), rtol=1e-5, atol=1e-5)


def test_softcap_bounds_the_scores() -> None:
    inputs = _inputs() | {"softcap": 2.0, "scale": 5.0}
    out, b = attention(**inputs), 24
    q, k, v = (inputs[name][0, 10:b] for name in ("query", "key", "value"))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = 2.0 * torch.tanh(torch.einsum("qnh,knh->nqk", q, k) * 5.0 / 2.0)
    scores = scores.masked_fill(torch.ones(14, 14).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(out[0, 10:b], torch.einsum("nqk,knh->qnh", scores.softmax(-1), v), rtol=1e-5, atol=1e-5)


def test_slopes_and_distance_logits_are_biases_by_distance() -> None:
    """Against a bias matrix handed to torch's attention, per head and query, distances past the table included."""
    slopes, table = torch.tensor([0.5, 0.25, 0.125, 0.0]), torch.randn(1, 24, 4, 5)
    inputs = _inputs() | {"slopes": slopes, "distance_logits": table}
    outputs = []
    for a, b in zip([0, 1, 10], [1, 10, 24], strict=True):
        q, k, v = (inputs[name][:, a:b].transpose(1, 2) for name in ("query", "key", "value"))
        bias = torch.full((1, 4, b - a, b - a), float("-inf"))
        for head in range(4):
            for i in range(b - a):
                for j in range(i + 1):
                    bias[0, head, i, j] = table[0, a + i, head, min(i - j, 4)] - slopes[head] * (i - j)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=inputs["scale"], enable_gqa=True)
        outputs.append(out.transpose(1, 2))
    torch.testing.assert_close(attention(**inputs), torch.cat(outputs, dim=1), rtol=1e-5, atol=1e-5)


def test_a_sink_takes_probability_and_gives_nothing() -> None:
    inputs = _inputs() | {"sinks": torch.full((4,), 30.0)}
    assert attention(**inputs).abs().max() < 1e-3
    inputs["sinks"] = torch.full((4,), -1e9)
    torch.testing.assert_close(attention(**inputs), attention(**(inputs | {"sinks": None})))


def test_a_sink_per_token_is_one_per_head_where_all_tokens_agree() -> None:
    per_head = torch.randn(4)
    expected = attention(**(_inputs() | {"sinks": per_head}))
    torch.testing.assert_close(attention(**(_inputs() | {"sinks": per_head.expand(1, 24, 4)})), expected)
    other = attention(**(_inputs() | {"sinks": torch.randn(1, 24, 4)}))
    assert not torch.allclose(other, expected)


def test_sequences_do_not_see_each_other() -> None:
    inputs = _inputs()
    before = attention(**inputs)[:, 10:].clone()
    inputs["key"][:, :10] += 1.0
    inputs["value"][:, :10] += 1.0
    torch.testing.assert_close(attention(**inputs)[:, 10:], before, rtol=0, atol=0)


def test_visible_keys_with_an_offset_is_the_tail_of_the_whole() -> None:
    whole = visible_keys(10, 10, True, 4, 3, 0, torch.device("cpu"))
    tail = visible_keys(2, 7, True, 4, 3, 3, torch.device("cpu"))
    assert torch.equal(tail, whole[-2:, 3:])
