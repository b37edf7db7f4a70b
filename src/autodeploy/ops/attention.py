"""Softmax attention over packed sequences, and its twin over a paged key-value cache.

Shapes: T tokens in the packed row, N query heads, K key-value heads (N a multiple of K), H head dimension of query and
key, V of value, S sequences. What a query may see is said by facts, never by a mask tensor: causal, sliding window,
chunk, soft cap, sinks, and a bias by distance: linear with one slope per head, or read from a table.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import Work, op
from autodeploy.ops.state import PagedState, StateSpec


@dataclass(frozen=True)
class MaskFacts:
    """What a query may see, as facts. All hold at once; none set means every key of its own sequence."""

    causal: bool = False
    sliding_window: int | None = None
    chunk_size: int | None = None


_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
    offset: int = 0,
) -> Tensor:
    """Attention of one sequence's last tokens to its tokens, scores and softmax in float32.

    Args:
        query: `[Tq, N, H]`, the sequence's last Tq tokens.
        key, value: `[Tk, K, H]` and `[Tk, K, V]`, the sequence's tokens from position `offset` to its end.
        sinks: `[N]` or `[Tq, N]` logits that take part in the softmax and are then dropped, or None.
        sliding_window: tokens a query looks back on, itself included.
        chunk_size: queries see their own chunk of this many positions only.
        softcap: scores become softcap · tanh(score / softcap).
        slopes: `[N]`; a score loses slope · distance, the distance from a key to its query (arXiv 2108.12409).
        distance_logits: `[Tq, N, D]`; a score gains the entry of its distance, the last one from D - 1 on.
    Returns:
        `[Tq, N, V]`.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    scores = torch.einsum("qnh,knh->nqk", query.float(), key.float()) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None or distance_logits is not None:
        scores = scores + distance_bias(query.shape[0], key.shape[0], slopes, distance_logits, query.device)
    visible = visible_keys(query.shape[0], key.shape[0], causal, sliding_window, chunk_size, offset, query.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float().expand(query.shape[0], -1).transpose(0, 1).unsqueeze(-1)
        weights = torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("nqk,knv->qnv", weights.to(value.dtype), value)


def visible_keys(
    num_queries: int,
    num_keys: int,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    offset: int,
    device: torch.device,
) -> Tensor:
    """Which keys, from position `offset` on, a sequence's last tokens may see: bool `[num_queries, num_keys]`."""
    end = offset + num_keys
    query_position = torch.arange(end - num_queries, end, device=device)[:, None]
    key_position = torch.arange(offset, end, device=device)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if causal:
        visible &= key_position <= query_position
    if sliding_window is not None:
        visible &= key_position > query_position - sliding_window
    if chunk_size is not None:
        visible &= key_position // chunk_size == query_position // chunk_size
    return visible


def distance_bias(
    num_queries: int, num_keys: int, slopes: Tensor | None, distance_logits: Tensor | None, device: torch.device
) -> Tensor:
    """What distance adds to the scores of a sequence's last tokens: float32 `[N, num_queries, num_keys]`."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    distance = queries - torch.arange(num_keys, device=device)
    bias = torch.zeros(1, num_queries, num_keys, device=device)
    if slopes is not None:
        bias = bias - slopes.float().reshape(-1, 1, 1) * distance
    if distance_logits is not None:
        logits = distance_logits.float().transpose(0, 1)
        index = distance.clamp(0, logits.shape[-1] - 1).expand(logits.shape[0], -1, -1)
        bias = bias + logits.gather(-1, index)
    return bias


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.shape[-1])


@op(tolerance=_TOLERANCE, opaque=True, fake=_attention_fake)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
) -> Tensor:
    """Attention within each of the packed sequences, each given whole (arXiv 1706.03762; facts as in `attend`).

    Args:
        query: `[1, T, N, H]`. key: `[1, T, K, H]`. value: `[1, T, K, V]`.
        cu_seqlens: int `[S+1]`, where each sequence starts in the row.
        sinks: `[N]`, `[1, T, N]` or None. distance_logits: `[1, T, N, D]` or None. The other facts as in `attend`.
    Returns:
        `[1, T, N, V]`.
    """
    facts = (scale, causal, sliding_window, chunk_size, softcap, slopes)
    parts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > start:
            row = slice(start, end)
            logits = None if distance_logits is None else distance_logits[0, row]
            parts.append(attend(query[0, row], key[0, row], value[0, row], _of_row(sinks, row), *facts, logits))
    return torch.cat(parts).unsqueeze(0)


def _of_row(sinks: Tensor | None, row: slice) -> Tensor | None:
    """The sinks of some tokens of the packed row."""
    return sinks[0, row] if sinks is not None and sinks.dim() == 3 else sinks


def write_entries(cache: Tensor, slot_mapping: Tensor, entries: Tensor) -> None:
    """Write an entry per token `[T, ...]` into `[pages, page_size, ...]`, in the cache's dtype.

    What is larger than the largest number of 8-bit floating point becomes that; a NaN stays one.
    """
    flat = cache.view(-1, *cache.shape[2:])
    if is_float8(cache.dtype):
        largest = torch.finfo(cache.dtype).max
        # as bytes: torch copies no float8 entries by index
        flat, entries = (
            flat.view(torch.uint8),
            entries.float().clamp(-largest, largest).to(cache.dtype).view(torch.uint8),
        )
    flat.index_copy_(0, slot_mapping, entries.to(flat.dtype))


def read_pages(cache: Tensor, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of some pages, one after another, in a dtype."""
    stored = cache.view(torch.uint8) if is_float8(cache.dtype) else cache
    return stored.index_select(0, pages).flatten(0, 1).view(cache.dtype).to(dtype)


def is_float8(dtype: torch.dtype) -> bool:
    """Whether numbers are 8-bit floating point."""
    return dtype.is_floating_point and dtype.itemsize == 1


def _cached_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.shape[-1])


@op(tolerance=_TOLERANCE, opaque=True, mutates=("key_cache", "value_cache"), fake=_cached_attention_fake)
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """`attention` where each sequence's earlier tokens come from pages; the new keys and values are written to them.

    Args:
        query, key, value: the new tokens, `[1, T, N, H]`, `[1, T, K, H]`, `[1, T, K, V]`.
        cu_seqlens: int `[S+1]`, new tokens of each sequence. seq_lens: int `[S]`, tokens including the new ones.
        page_table: int `[S, P]`. slot_mapping: int `[T]`, where each new token's entry goes.
        key_cache: `[pages, page_size, K, H]`. value_cache: `[pages, page_size, K, V]`. Of the query's dtype, or float8.
    Returns:
        `[1, T, N, V]`.
    """
    page_size = key_cache.shape[1]
    write_entries(key_cache, slot_mapping, key[0])
    write_entries(value_cache, slot_mapping, value[0])
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    borders, lengths = cu_seqlens.tolist(), seq_lens.tolist()
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        if end == start:
            continue
        length = lengths[index]
        first = _first_visible(length - (end - start), sliding_window, chunk_size) // page_size
        pages = page_table[index, first : -(-length // page_size)]
        seen = slice(0, length - first * page_size)
        output[0, start:end] = _attend_fused(
            query[0, start:end],
            read_pages(key_cache, pages, query.dtype)[seen],
            read_pages(value_cache, pages, query.dtype)[seen],
            _of_row(sinks, slice(start, end)),
            scale,
            causal,
            sliding_window,
            chunk_size,
            softcap,
            slopes,
            None if distance_logits is None else distance_logits[0, start:end],
            first * page_size,
        )
    return output


def _first_visible(position: int, sliding_window: int | None, chunk_size: int | None) -> int:
    """The first position that the query at `position`, and so any later one, may still see."""
    first = 0
    if sliding_window is not None:
        first = max(first, position - sliding_window + 1)
    if chunk_size is not None:
        first = max(first, position // chunk_size * chunk_size)
    return first


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    distance_logits: Tensor | None,
    offset: int,
) -> Tensor:
    """`attend`, through torch's fused attention where that has the facts."""
    if softcap is not None or sinks is not None or distance_logits is not None or slopes is not None:
        facts = (sinks, scale, causal, sliding_window, chunk_size, softcap, slopes, distance_logits)
        return attend(query, key, value, *facts, offset)
    num_queries, num_keys = query.shape[0], key.shape[0]
    plain = sliding_window is None and chunk_size is None
    mask = None
    is_causal = plain and causal and num_queries == num_keys
    if not is_causal and (not plain or (causal and num_queries > 1)):
        mask = visible_keys(num_queries, num_keys, causal, sliding_window, chunk_size, offset, query.device)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)


@attention.with_states(cached_attention)
def attention_states(key: Tensor, value: Tensor, sliding_window: int | None, **_: Any) -> dict[str, StateSpec]:
    """Keys and values, which may be kept with fewer bits than they have."""

    def kept(name: str, x: Tensor) -> PagedState:
        return PagedState(
            name=name, shape=tuple(x.shape[2:]), dtype=x.dtype, window=sliding_window, may_be_rounded=True
        )

    return {"key_cache": kept("key_cache", key), "value_cache": kept("value_cache", value)}


@attention.with_work
@cached_attention.with_work
def attention_work(query: Tensor, value: Tensor, sliding_window: int | None, chunk_size: int | None, **_: Any) -> Work:
    """What a query costs for each key that it sees."""
    heads, dim = query.shape[-2:]
    window = min((size for size in (sliding_window, chunk_size) if size is not None), default=None)
    return Work(flops_per_key=2 * heads * (dim + value.shape[-1]), window=window)


@attention.with_samples
def attention_samples() -> list[dict[str, Any]]:
    """Three sequences of one head size, with each fact."""
    plain: dict[str, Any] = {
        "query": torch.randn(1, 24, 4, 16),
        "key": torch.randn(1, 24, 2, 16),
        "value": torch.randn(1, 24, 2, 16),
        "cu_seqlens": torch.tensor([0, 1, 10, 24], dtype=torch.int32),
        "sinks": None,
        "scale": 0.25,
        "causal": True,
        "sliding_window": None,
        "chunk_size": None,
        "softcap": None,
        "slopes": None,
        "distance_logits": None,
    }
    return [
        plain,
        plain | {"sliding_window": 5},
        plain | {"chunk_size": 4},
        plain | {"softcap": 3.0, "sinks": torch.randn(4)},
        plain | {"softcap": 3.0, "chunk_size": 6},
        plain | {"value": torch.randn(1, 24, 2, 8), "key": torch.randn(1, 24, 2, 16)},
        plain | {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        plain | {"sinks": torch.randn(1, 24, 4)},
        plain | {"distance_logits": torch.randn(1, 24, 4, 6), "sliding_window": 9},
    ]
