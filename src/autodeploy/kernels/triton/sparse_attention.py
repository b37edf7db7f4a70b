"""cached_sparse_attention over pages: tokens or blocks of them are scored, the best are listed and attended to.

1. For each token and each index head that chooses, a score of every block that the token sees.
2. One program for each list finds the least score that is among the best, bit by bit, and writes down the blocks from
   it up, in order; of equal ones the earliest.
3. Attention as in `attention.py`, of one token, through the entries of its list instead of its whole context.

Scores lie in memory between the first two steps, for as many tokens at a time as there is room for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.launch import Launcher, why_refused
from autodeploy.kernels.triton.paged import (
    LOG2_E,
    Splits,
    configurations,
    find_entries,
    find_split,
    find_tile,
    num_splits,
    softmax_step,
    store_rows,
    why_not_kept,
    write_entries,
)
from autodeploy.ops.attention import is_float8
from autodeploy.ops.sparse_attention import cached_sparse_attention

_MOST_ROWS = 128
_MOST_WIDTH_BYTES = 1024
_MOST_SCORES = 1 << 24
"""Scores, float32, that are kept at a time."""


@triton.jit(do_not_specialize=["num_sequences", "page_table_width", "first_token"])
def _score(
    index_query, index_weights, index_cache, scores, cu_seqlens, seq_lens, page_table, num_sequences, page_table_width,
    first_token, num_blocks, query_stride, weight_stride,
    NUM_INDEX_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What index heads think of some blocks, the best token of each; a token's own block and local ones come first."""
    row = tl.program_id(0)
    sequence, token, end = find_tile(cu_seqlens, num_sequences, first_token + row, 1)
    position = tl.load(seq_lens + sequence) - end + token
    blocks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if (tl.program_id(1) * BLOCK_K * BLOCK_SIZE > position) | (token >= end):
        return
    head = tl.arange(0, BLOCK_I)
    width = tl.arange(0, BLOCK_D)
    place = index_query + token.to(tl.int64) * query_stride + head[:, None] * DIM + width[None, :]
    query = tl.load(place, mask=(head < NUM_INDEX_HEADS)[:, None] & (width < DIM)[None, :], other=0.0)
    best = tl.full([BLOCK_I, BLOCK_K], float("-inf"), tl.float32)
    for offset in range(0, BLOCK_SIZE):
        keys = blocks * BLOCK_SIZE + offset
        inside = keys <= position
        entries = find_entries(page_table, sequence, page_table_width, keys, inside, PAGE_SIZE)
        mask = inside[None, :] & (width < DIM)[:, None]
        key = tl.load(index_cache + entries[None, :] * DIM + width[:, None], mask=mask, other=0.0)
        found = dot(query, key.to(query.dtype), tl.zeros([BLOCK_I, BLOCK_K], tl.float32))
        if index_weights is not None:
            own = index_weights + token.to(tl.int64) * weight_stride + head
            weight = tl.load(own, mask=head < NUM_INDEX_HEADS, other=0.0).to(tl.float32)
            together = tl.sum(tl.maximum(found, 0.0) * weight[:, None], 0)
            found = tl.broadcast_to(together[None, :], (BLOCK_I, BLOCK_K))
        best = tl.maximum(best, tl.where(inside[None, :], found, float("-inf")))
    behind = position // BLOCK_SIZE - blocks
    best = tl.where(((behind >= 0) & (behind < LOCAL_BLOCKS))[None, :], float("inf"), best)
    num_lists = 1 if index_weights is not None else NUM_INDEX_HEADS
    target = scores + (row.to(tl.int64) * num_lists + head)[:, None] * num_blocks + blocks[None, :]
    tl.store(target, best + 0.0, mask=(head < num_lists)[:, None] & (blocks * BLOCK_SIZE <= position)[None, :])


@triton.jit
def _in_order(score):
    """Scores as whole numbers from 0 on in the same order."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit(do_not_specialize=["num_sequences", "first_token", "list_stride"])
def _list_best(
    scores, lists, cu_seqlens, seq_lens, num_sequences, first_token, num_blocks, list_stride,
    TOP_K: tl.constexpr, NUM_LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, token, end = find_tile(cu_seqlens, num_sequences, first_token + tl.program_id(0), 1)
    if token >= end:
        return
    count = (tl.load(seq_lens + sequence) - end + token) // BLOCK_SIZE + 1
    scores += (row * NUM_LISTS + own) * num_blocks
    lane = tl.arange(0, BLOCK)
    least = tl.zeros([], tl.int64)
    above = tl.zeros([], tl.int32)  # how many are better than the least
    if count > TOP_K:
        for step in range(0, 32):
            tried = least + (tl.full([], 1, tl.int64) << (31 - step))
            enough = tl.zeros([BLOCK], tl.int32)
            for start in range(0, count, BLOCK):
                inside = start + lane < count
                number = _in_order(tl.load(scores + start + lane, mask=inside, other=float("-inf")))
                enough += ((number >= tried) & inside).to(tl.int32)
            least = tl.where(tl.sum(enough, 0) >= TOP_K, tried, least)
        better = tl.zeros([BLOCK], tl.int32)
        for start in range(0, count, BLOCK):
            inside = start + lane < count
            number = _in_order(tl.load(scores + start + lane, mask=inside, other=float("-inf")))
            better += ((number > least) & inside).to(tl.int32)
        above = tl.sum(better, 0)
    lists += ((first_token + row) * NUM_LISTS + own) * list_stride
    written = tl.zeros([], tl.int32)
    equal = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        inside = start + lane < count
        number = _in_order(tl.load(scores + start + lane, mask=inside, other=float("-inf")))
        is_equal = ((number == least) & inside).to(tl.int32)
        is_early = equal + tl.cumsum(is_equal, 0) <= TOP_K - above
        chosen = (inside & ((number > least) | ((is_equal > 0) & is_early))).to(tl.int32)
        place = written + tl.cumsum(chosen, 0) - 1
        tl.store(lists + place, (start + lane).to(tl.int32), mask=chosen > 0)
        written += tl.sum(chosen, 0)
        equal += tl.sum(is_equal, 0)


@triton.jit(do_not_specialize=["num_sequences", "page_table_width", "list_stride"])
def _attend_listed(
    query, key_cache, value_cache, out, partial, sums, lists, cu_seqlens, seq_lens, page_table, sinks,
    num_sequences, page_table_width, token_stride, head_stride, list_stride,
    SCALE: tl.constexpr, TOP_K: tl.constexpr, NUM_LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token and the GROUP query heads that have a list and a key-value head in common."""
    sequence, token, end = find_tile(cu_seqlens, num_sequences, tl.program_id(0), 1)
    if token >= end:
        return
    group, split = tl.program_id(1), tl.program_id(2)
    own, kv_head = group * GROUP * NUM_LISTS // NUM_HEADS, group * GROUP * NUM_KV_HEADS // NUM_HEADS
    row = tl.arange(0, BLOCK_M)
    head, is_row = group * GROUP + row, row < GROUP
    position = tl.load(seq_lens + sequence) - end + token
    width, value_width = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_V)
    place = query + token.to(tl.int64) * token_stride + head[:, None] * head_stride + width[None, :]
    tile = tl.load(place, mask=is_row[:, None] & (width < HEAD_DIM)[None, :], other=0.0)
    rows = token.to(tl.int64) * NUM_HEADS + head
    lists += (token.to(tl.int64) * NUM_LISTS + own) * list_stride
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(split == 0, sink, top)
        total += tl.where(split == 0, 1.0, 0.0)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    listed = tl.minimum(position // BLOCK_SIZE + 1, TOP_K) * BLOCK_SIZE
    begin, stop = find_split(0, listed, BLOCK_K)
    for start in range(begin, stop, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        block = tl.load(lists + entry // BLOCK_SIZE, mask=entry < stop, other=0)
        keys = block * BLOCK_SIZE + entry % BLOCK_SIZE
        visible = (entry < stop) & (keys <= position)
        places = find_entries(page_table, sequence, page_table_width, keys, visible, PAGE_SIZE) * NUM_KV_HEADS + kv_head
        mask = visible[None, :] & (width < HEAD_DIM)[:, None]
        key = tl.load(key_cache + places[None, :] * HEAD_DIM + width[:, None], mask=mask, other=0.0)
        mask = visible[:, None] & (value_width < VALUE_DIM)[None, :]
        value = tl.load(value_cache + places[:, None] * VALUE_DIM + value_width[None, :], mask=mask, other=0.0)
        products = dot(tile, key.to(tile.dtype), tl.zeros([BLOCK_M, BLOCK_K], tl.float32))
        products = tl.where(visible[None, :], products * (SCALE * LOG2_E), float("-inf"))
        mixed, total, top = softmax_step(mixed, total, top, products, value.to(tile.dtype))
    store_rows(out, partial, sums, rows, is_row, mixed, total, top, VALUE_DIM, IS_SPLIT)


_score_blocks = Launcher(_score)
_find_best = Launcher(_list_best)
_attend = Launcher(
    _attend_listed,
    configurations((64, 4, 3), (32, 4, 3), (128, 8, 2)),
    ("IS_SPLIT", "BLOCK_M", "NUM_HEADS", "NUM_KV_HEADS", "HEAD_DIM", "VALUE_DIM", "PAGE_SIZE", "BLOCK_SIZE"),
)


def _supports(
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
) -> str | None:
    heads, kv_heads, index_heads = query.shape[2], key.shape[2], index_query.shape[2]
    groups = _num_groups(heads, kv_heads, 1 if index_weights is not None else index_heads)
    if groups is None or heads // groups > _MOST_ROWS or index_heads > _MOST_ROWS:
        return f"{heads} query, {kv_heads} key-value and {index_heads} index heads, which do not share evenly"
    widest = max(query.shape[3], value.shape[3], index_query.shape[3])
    if widest * query.dtype.itemsize > _MOST_WIDTH_BYTES:
        return f"heads of {widest} {query.dtype}; there are kernels up to {_MOST_WIDTH_BYTES} bytes"
    if not (key_cache.is_contiguous() and value_cache.is_contiguous() and index_key_cache.is_contiguous()):
        return "caches with gaps"
    caches = [cache for cache in (key_cache, value_cache) if not is_float8(cache.dtype)]
    reason = why_refused(query, key, value, *caches) or why_refused(index_query, index_key, index_key_cache)
    return reason or why_refused(index_weights) or why_not_kept(key_cache, value_cache)


def _num_groups(num_heads: int, num_kv_heads: int, num_lists: int) -> int | None:
    """Groups of query heads that have a list and a key-value head in common; None where they overlap otherwise."""
    groups = max(num_kv_heads, num_lists)
    return None if num_heads % groups or groups % num_kv_heads or groups % num_lists else groups


def _listed(
    index_query: Tensor,
    index_weights: Tensor | None,
    index_key_cache: Tensor,
    sequences: tuple[Tensor, Tensor, Tensor],
    top_k: int,
    block_size: int,
    local_blocks: int,
) -> Tensor:
    """The best blocks of each token and list, in order: int32 `[T, lists, most]`, undefined behind the last."""
    cu_seqlens, seq_lens, page_table = sequences
    _, num_tokens, num_index_heads, dim = index_query.shape
    num_sequences, page_table_width = page_table.shape
    page_size = index_key_cache.shape[1]
    num_blocks = triton.cdiv(page_table_width * page_size, block_size)
    num_lists = num_index_heads if index_weights is None else 1
    lists = seq_lens.new_empty(num_tokens, num_lists, min(top_k, num_blocks), dtype=seq_lens.dtype)
    at_once = min(num_tokens, max(1, _MOST_SCORES // (num_lists * num_blocks)))
    scores = index_query.new_empty(at_once * num_lists * num_blocks, dtype=torch.float32)
    block_k = min(64, max(16, triton.next_power_of_2(num_blocks)))
    for first in range(0, num_tokens, at_once):
        count = min(at_once, num_tokens - first)
        _score_blocks(
            (count, triton.cdiv(num_blocks, block_k)),
            *(index_query, index_weights, index_key_cache, scores, cu_seqlens, seq_lens, page_table),
            *(num_sequences, page_table_width, first, num_blocks, num_index_heads * dim, num_index_heads),
            **{"NUM_INDEX_HEADS": num_index_heads, "DIM": dim},
            BLOCK_I=max(16, triton.next_power_of_2(num_index_heads)),
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            **{"BLOCK_SIZE": block_size, "LOCAL_BLOCKS": local_blocks, "PAGE_SIZE": page_size, "BLOCK_K": block_k},
        )
        _find_best(
            (count, num_lists),
            *(scores, lists, cu_seqlens, seq_lens, num_sequences, first, num_blocks, lists.shape[2]),
            **{"TOP_K": top_k, "NUM_LISTS": num_lists, "BLOCK_SIZE": block_size},
            BLOCK=min(1024, max(16, triton.next_power_of_2(num_blocks))),
        )
    return lists


@cached_sparse_attention.kernel("triton", _supports)
def cached_sparse_attention_triton(
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
    """`cached_sparse_attention` that reads the chosen entries of the pages and no others."""
    write_entries(key, key_cache, slot_mapping, value, value_cache)
    write_entries(index_key.unsqueeze(2), index_key_cache.unsqueeze(2), slot_mapping)
    query = query if query.stride(3) == 1 else query.contiguous()
    weights = None if index_weights is None else index_weights.contiguous()
    page_table = page_table.contiguous()
    _, num_tokens, num_heads, head_dim = query.shape
    num_sequences, page_table_width = page_table.shape
    _, page_size, num_kv_heads, value_dim = value_cache.shape
    sequences = cu_seqlens, seq_lens, page_table
    lists = _listed(index_query.contiguous(), weights, index_key_cache, sequences, top_k, block_size, local_blocks)
    num_lists, most = lists.shape[1:]
    groups = _num_groups(num_heads, num_kv_heads, num_lists)
    assert groups is not None
    out = value.new_empty(1, num_tokens, num_heads, value_dim)
    splits = Splits(out, num_splits(num_tokens * groups, most * block_size, query.device))
    _attend(
        (num_tokens, groups, splits.count),
        *(query, key_cache, value_cache, out, splits.partial, splits.sums, lists, cu_seqlens, seq_lens, page_table),
        *(None if sinks is None else sinks.contiguous(), num_sequences, page_table_width),
        *(query.stride(1), query.stride(2), most),
        **{"SCALE": scale, "TOP_K": top_k, "NUM_LISTS": num_lists, "BLOCK_SIZE": block_size},
        **{"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "GROUP": num_heads // groups},
        **{"HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "PAGE_SIZE": page_size, "IS_SPLIT": splits.count > 1},
        BLOCK_H=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_M=max(16, triton.next_power_of_2(num_heads // groups)),
    )
    splits.combine()
    return out
