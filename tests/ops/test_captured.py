"""Captured ops run as they are: a captured call equals the canonical attention it will become."""

import pytest
import torch

from autodeploy.ops import attention, captured_attention, captured_mask, sparse_attention
from autodeploy.ops.sparse_attention import index_scores


@pytest.mark.parametrize(
    "facts", [(True, None, None), (True, 5, None), (True, None, 4), (False, None, None), (True, 6, 8)]
)
def test_masked_call_equals_attention_with_the_same_facts(facts: tuple[bool, int | None, int | None]) -> None:
    sample = attention.samples()[0]
    causal, window, chunk = facts
    positions = torch.zeros(1, 24, dtype=torch.int64)
    mask = captured_mask(sample["cu_seqlens"], positions, causal, window, chunk)
    q, k, v = (sample[name].transpose(1, 2) for name in ("query", "key", "value"))
    result = captured_attention(q, k, v, mask, sample["cu_seqlens"], None, 0.25, True, None, None, None, None, 1)
    expected = attention(**(sample | {"causal": causal, "sliding_window": window, "chunk_size": chunk}))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_call_without_a_mask_takes_its_own_facts() -> None:
    sample = attention.samples()[0]
    q, k, v = (sample[name].transpose(1, 2) for name in ("query", "key", "value"))
    result = captured_attention(q, k, v, None, sample["cu_seqlens"], torch.ones(4), 0.25, True, 5, 2.0, None, None, 1)
    expected = attention(**(sample | {"sinks": torch.ones(4), "sliding_window": 5, "softcap": 2.0}))
    torch.testing.assert_close(result, expected)


def test_mask_is_block_diagonal_over_packed_sequences() -> None:
    mask = captured_mask(
        torch.tensor([0, 2, 5], dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int64), False, None, None
    )
    assert mask.shape == (1, 1, 5, 5)
    assert torch.equal(mask[0, 0], torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool())


def test_an_additive_mask_and_a_bias_add_up() -> None:
    sample = attention.samples()[0]
    q, k, v = (sample[name].transpose(1, 2) for name in ("query", "key", "value"))
    borders, bias = sample["cu_seqlens"], torch.randn(1, 4, 24, 24)
    mask = captured_mask(borders, torch.zeros(1, 24, dtype=torch.int64), True, None, None)
    expected = captured_attention(q, k, v, mask, borders, None, 0.25, True, None, None, bias, None, 1)
    added = bias.masked_fill(~mask, torch.finfo(torch.float32).min)
    result = captured_attention(q, k, v, added, borders, None, 0.25, True, None, None, None, None, 1)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        captured_attention(q, k, v, None, borders, None, 0.25, True, None, None, bias, None, 1), expected
    )


@pytest.mark.parametrize("kind", [0, 2], ids=["tokens", "blocks"])
def test_chosen_tokens_are_those_of_sparse_attention(kind: int) -> None:
    """Indices computed here, as a model would, give what the op gives that chooses for itself."""
    sample = sparse_attention.samples()[kind] | {"cu_seqlens": torch.tensor([0, 24], dtype=torch.int32)}
    weights = None if sample["index_weights"] is None else sample["index_weights"][0]
    size, count = sample["block_size"], sample["top_k"]
    scores = index_scores(sample["index_query"][0], sample["index_key"][0], weights, size, sample["local_blocks"])
    values, indices = scores.sort(dim=-1, descending=True, stable=True)  # the earliest of equally good ones
    indices = indices.masked_fill(values == -torch.inf, -1)[None, ..., :count]
    q, k, v = (sample[name].transpose(1, 2) for name in ("query", "key", "value"))
    result = captured_attention(q, k, v, None, sample["cu_seqlens"], None, 0.25, True, None, None, None, indices, size)
    torch.testing.assert_close(result, sparse_attention(**sample), rtol=1e-5, atol=1e-5)
