"""Sparse attention against plain loops, its limits against ordinary attention, and the indexer token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.ops import attention, sparse_attention
from autodeploy.ops.sparse_attention import index_scores


def _by_loops(sample: dict[str, Any], start: int, end: int) -> Tensor:
    """One sequence, one query and head at a time, with Python's own sorting."""
    outputs = []
    for i in range(start, end):
        heads = []
        for head in range(4):
            group = head // 2
            scores = {}
            for j in range(start, i + 1):
                products = sample["index_query"][0, i] @ sample["index_key"][0, j]
                if sample["index_weights"] is not None:
                    scores[j] = float((sample["index_weights"][0, i] * products.clamp(min=0)).sum())
                else:
                    scores[j] = float(products[group])
            size = sample["block_size"]
            blocks: dict[int, float] = {}
            for j, score in scores.items():
                block = (j - start) // size
                blocks[block] = max(score, blocks.get(block, score))
            for block in range((i - start) // size, (i - start) // size - sample["local_blocks"], -1):
                if block in blocks:
                    blocks[block] = float("inf")
            best = sorted(blocks, key=lambda block: -blocks[block])[: sample["top_k"]]
            seen = [j for j in scores if (j - start) // size in best]
            logits = torch.stack([sample["query"][0, i, head] @ sample["key"][0, j, group] * 0.25 for j in seen])
            if sample["sinks"] is not None:
                weights = torch.cat((logits, sample["sinks"][head : head + 1])).softmax(0)[:-1]
            else:
                weights = logits.softmax(0)
            heads.append(weights @ torch.stack([sample["value"][0, j, group] for j in seen]))
        outputs.append(torch.stack(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("number", range(4))
def test_against_plain_loops(number: int) -> None:
    torch.manual_seed(number)
    sample = sparse_attention.samples()[number]
    expected = torch.cat([_by_loops(sample, a, b) for a, b in [(0, 1), (1, 10), (10, 24)]])
    torch.testing.assert_close(sparse_attention(**sample)[0], expected, rtol=1e-5, atol=1e-5)


def test_choosing_everything_is_ordinary_attention() -> None:
    sample = sparse_attention.samples()[0] | {"top_k": 99}
    facts = {"causal": True, "scale": 0.25, "sinks": None, "cu_seqlens": sample["cu_seqlens"]}
    names = ("sliding_window", "chunk_size", "softcap", "slopes", "distance_logits")
    plain = {name: sample[name] for name in ("query", "key", "value")} | facts | dict.fromkeys(names)
    torch.testing.assert_close(sparse_attention(**sample), attention(**plain), rtol=1e-5, atol=1e-5)


def test_the_scores_of_the_last_queries_are_the_last_rows() -> None:
    query, key, weights = torch.randn(11, 3, 8), torch.randn(11, 8), torch.randn(11, 3)
    whole = index_scores(query, key, weights, 4, 1)
    torch.testing.assert_close(index_scores(query[-2:], key, weights[-2:], 4, 1), whole[:, -2:])
    assert whole.shape == (1, 11, 3) and bool(whole[0, 0, 1:].isinf().all())
