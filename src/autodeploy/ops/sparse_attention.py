"""Attention to a few chosen tokens: an indexer scores earlier tokens, the best are attended to; and its cached twin.

Shapes as in `ops/attention.py`; I index heads of dimension D beside them. An indexer has small queries and keys of its
own. Its choice is of tokens, one for all heads, where it has weights per index head, and of blocks of tokens, one per
group of heads, where it has none.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.attention import read_pages, visible_keys, write_entries
from autodeploy.ops.op import op
from autodeploy.ops.state import PagedState, StateSpec

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def index_scores(
    index_query: Tensor, index_key: Tensor, index_weights: Tensor | None, block_size: int, local_blocks: int
) -> Tensor:
    """What the indexer thinks of each token or block, for a sequence's last tokens; float32 `[G, Tq, blocks]`.

    With weights (arXiv 2512.02556, section 2.1) a token's score is sum of weight · relu(query · key) over index heads,
    and G is 1; without, index heads choose each for themselves. A block's score is that of its best token; a query's
    own block and the `local_blocks - 1` before it come first. Tokens after the query do not count.

    Args:
        index_query: `[Tq, I, D]`. index_key: `[Tk, D]`. index_weights: `[Tq, I]` or None.
    """
    num_queries, num_keys = index_query.shape[0], index_key.shape[0]
    scores = torch.einsum("qid,kd->iqk", index_query.float(), index_key.float())
    if index_weights is not None:
        scores = torch.einsum("qi,iqk->qk", index_weights.float(), scores.relu())[None]
    visible = visible_keys(num_queries, num_keys, True, None, None, 0, index_query.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    scores = F.pad(scores, (0, -num_keys % block_size), value=float("-inf"))
    scores = scores.reshape(*scores.shape[:2], -1, block_size).amax(-1)
    if local_blocks:
        own = torch.arange(num_keys - num_queries, num_keys, device=scores.device)[:, None] // block_size
        behind = own - torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill((behind >= 0) & (behind < local_blocks), float("inf"))
    return scores


def attend_chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    top_k: int,
    block_size: int,
    local_blocks: int,
) -> Tensor:
    """Causal attention of one sequence's last tokens `[Tq, N, H]` to those of its tokens `[Tk, K, H]` that are chosen.

    Returns:
        `[Tq, N, V]`.
    """
    scores = index_scores(index_query, index_key, index_weights, block_size, local_blocks)
    # Of equal scores the earliest count, so that the choice does not depend on how a sequence is cut into chunks.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    seen = chosen.repeat_interleave(block_size, -1)[..., : key.shape[0]]
    seen = seen & visible_keys(query.shape[0], key.shape[0], True, None, None, 0, query.device)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = torch.einsum("qnh,knh->nqk", query.float(), key.float()) * scale
    logits = logits.masked_fill(~seen.repeat_interleave(query.shape[1] // seen.shape[0], 0), float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(-1, 1, 1).expand(-1, query.shape[0], 1)
        weights = torch.softmax(torch.cat((logits, column), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(logits, dim=-1)
    return torch.einsum("nqk,knv->qnv", weights.to(value.dtype), value)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.shape[-1])


@op(tolerance=_TOLERANCE, opaque=True, fake=_fake)
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor | None,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    top_k: int,
    block_size: int,
    local_blocks: int,
) -> Tensor:
    """Causal attention within each packed sequence, of each query to the tokens its indexer chooses.

    Args:
        query: `[1, T, N, H]`. key: `[1, T, K, H]`. value: `[1, T, K, V]`.
        index_query: `[1, T, I, D]`. index_key: `[1, T, D]`. index_weights: `[1, T, I]`, or None (see `index_scores`).
        sinks: `[N]` logits that take part in the softmax and are then dropped, or None.
        top_k: tokens chosen per query, or blocks of `block_size` tokens where that is more than 1.
        local_blocks: blocks up to the query's own that are always among them.
    Returns:
        `[1, T, N, V]`.
    """
    facts: Any = (sinks, scale, top_k, block_size, local_blocks)
    tensors = (query, key, value, index_query, index_key, index_weights)
    parts: list[Tensor] = [
        attend_chosen(*_rows(tensors, slice(start, end)), *facts)
        for start, end in itertools.pairwise(cu_seqlens.tolist())
        if end > start
    ]
    return torch.cat(parts).unsqueeze(0)


def _rows(tensors: tuple[Tensor | None, ...], rows: slice) -> list[Any]:
    return [None if tensor is None else tensor[0, rows] for tensor in tensors]


@op(tolerance=_TOLERANCE, opaque=True, mutates=("key_cache", "value_cache", "index_key_cache"), fake=_fake)
def cached_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor | None,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    top_k: int,
    block_size: int,
    local_blocks: int,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    index_key_cache: Tensor,
) -> Tensor:
    """`sparse_attention` where earlier tokens' keys, values and index keys come from pages; the new ones are written.

    Args:
        cu_seqlens: int `[S+1]`, new tokens of each sequence. seq_lens: int `[S]`, tokens including the new ones.
        page_table: int `[S, P]`. slot_mapping: int `[T]`, where each new token's entry goes.
        key_cache: `[pages, page_size, K, H]`. value_cache: `[.., K, V]`. index_key_cache: `[pages, page_size, D]`.
    Returns:
        `[1, T, N, V]`.
    """
    caches = (key_cache, value_cache, index_key_cache)
    for cache, new in zip(caches, (key, value, index_key), strict=True):
        write_entries(cache, slot_mapping, new[0])
    page_size = key_cache.shape[1]
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    for index, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if end == start:
            continue
        length = int(seq_lens[index])
        pages = page_table[index, : -(-length // page_size)]
        keys, values, index_keys = (read_pages(cache, pages, query.dtype)[:length] for cache in caches)
        new_query, new_index_query, new_weights = _rows((query, index_query, index_weights), slice(start, end))
        chosen: Any = (new_index_query, index_keys, new_weights)
        facts: Any = (sinks, scale, top_k, block_size, local_blocks)
        output[0, start:end] = attend_chosen(new_query, keys, values, *chosen, *facts)
    return output


@sparse_attention.with_states(cached_sparse_attention)
def _states(key: Tensor, value: Tensor, index_key: Tensor, **_: Any) -> dict[str, StateSpec]:
    key_shape, value_shape = tuple(key.shape[2:]), tuple(value.shape[2:])
    return {
        "key_cache": PagedState(name="key_cache", shape=key_shape, dtype=key.dtype, may_be_rounded=True),
        "value_cache": PagedState(name="value_cache", shape=value_shape, dtype=value.dtype, may_be_rounded=True),
        "index_key_cache": PagedState(
            name="index_key_cache", shape=tuple(index_key.shape[2:]), dtype=index_key.dtype, shard_dim=None
        ),
    }


@sparse_attention.with_samples
def _samples() -> list[dict[str, Any]]:
    tokens: dict[str, Any] = {
        "query": torch.randn(1, 24, 4, 16),
        "key": torch.randn(1, 24, 2, 16),
        "value": torch.randn(1, 24, 2, 8),
        "index_query": torch.randn(1, 24, 3, 8),
        "index_key": torch.randn(1, 24, 8),
        "index_weights": torch.randn(1, 24, 3),
        "cu_seqlens": torch.tensor([0, 1, 10, 24], dtype=torch.int32),
        "sinks": None,
        "scale": 0.25,
        "top_k": 4,
        "block_size": 1,
        "local_blocks": 0,
    }
    blocks = {"index_query": torch.randn(1, 24, 2, 8), "index_weights": None, "top_k": 2, "block_size": 3}
    return [tokens, tokens | {"sinks": torch.randn(4)}, tokens | blocks | {"local_blocks": 1}, tokens | blocks]
