"""cached_attention over pages that are read in place: one kernel for decode steps, chunks of prompts and mixtures.

A program takes a tile of new tokens of one sequence with all query heads of one key-value head, so that they share
what is loaded, and goes through the sequence's keys by blocks. With few programs, contexts are cut into splits.

Sources: FlashAttention-2 (arXiv 2307.08691), its contexts in splits for decoding (flash-decoding), pages
(arXiv 2309.06180).
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
    most_tiles,
    num_splits,
    softmax_step,
    store_rows,
    tokens_per_tile,
    why_not_kept,
    write_entries,
)
from autodeploy.ops.attention import cached_attention, is_float8

_MOST_ROWS = 128
_MOST_WIDTH_BYTES = 1024
"""Widest head of which a few blocks of keys and values fit into shared memory."""


@triton.jit
def _first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that the query at `position` sees."""
    first = position * 0
    if WINDOW is not None:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK is not None:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def _add_facts(
    scores, distance, slope, logits, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NUM_DISTANCES: tl.constexpr
):  # fmt: skip
    """Products as scores to the base of 2: scaled, capped, and with what distance adds."""
    if SOFTCAP is None:
        scores *= SCALE * LOG2_E
    else:
        scores = (2 * tl.sigmoid(scores * (2 * SCALE / SOFTCAP)) - 1) * (SOFTCAP * LOG2_E)  # tanh
    if slope is not None:
        scores -= slope[:, None] * distance * LOG2_E
    if logits is not None:
        index = tl.minimum(tl.maximum(distance, 0), NUM_DISTANCES - 1)
        scores += tl.load(logits[:, None] + index).to(tl.float32) * LOG2_E
    return scores


@triton.jit
def _attend_blocks(
    state, query, position, begin, stop, key_cache, value_cache, kv_head, page_table, sequence, page_table_width,
    slope, logits, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, NUM_DISTANCES: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys `begin` to `stop` go into the softmax of a tile's rows. MASKED: not every row sees every one of them."""
    mixed, total, top = state
    width = tl.arange(0, query.shape[1])
    value_width = tl.arange(0, BLOCK_V)
    for start in range(begin, stop, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        inside = keys < stop
        entries = find_entries(page_table, sequence, page_table_width, keys, inside, PAGE_SIZE) * NUM_KV_HEADS + kv_head
        key_mask = inside[None, :] & (width < HEAD_DIM)[:, None]
        key = tl.load(key_cache + entries[None, :] * HEAD_DIM + width[:, None], mask=key_mask, other=0.0)
        value_mask = inside[:, None] & (value_width < VALUE_DIM)[None, :]
        value = tl.load(value_cache + entries[:, None] * VALUE_DIM + value_width[None, :], mask=value_mask, other=0.0)
        key, value = key.to(query.dtype), value.to(query.dtype)
        scores = dot(query, key, tl.zeros([query.shape[0], BLOCK_K], tl.float32))
        distance = position[:, None] - keys[None, :]
        scores = _add_facts(scores, distance, slope, logits, SCALE, SOFTCAP, NUM_DISTANCES)
        if MASKED:
            visible = inside[None, :] & (keys[None, :] >= _first_visible(position, WINDOW, CHUNK)[:, None])
            if CAUSAL:
                visible = visible & (distance >= 0)
            elif CHUNK is not None:
                visible = visible & (keys[None, :] // CHUNK == position[:, None] // CHUNK)
            scores = tl.where(visible, scores, float("-inf"))
        mixed, total, top = softmax_step(mixed, total, top, scores, value)
    return mixed, total, top


@triton.jit(do_not_specialize=["num_sequences", "page_table_width"])
def _attend(
    query, key_cache, value_cache, out, partial, sums, cu_seqlens, seq_lens, page_table, sinks, slopes, distance_logits,
    num_sequences, page_table_width, token_stride, head_stride,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    NUM_DISTANCES: tl.constexpr, SINKS_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    sequence, first_token, end = find_tile(cu_seqlens, num_sequences, tl.program_id(0), BLOCK_T)
    if first_token >= end:
        return
    kv_head, split = tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (token < end) & (row < BLOCK_T * GROUP)
    length = tl.load(seq_lens + sequence)
    position = length - end + token
    width = tl.arange(0, BLOCK_H)
    place = token.to(tl.int64)[:, None] * token_stride + head[:, None] * head_stride + width[None, :]
    tile = tl.load(query + place, mask=is_row[:, None] & (width < HEAD_DIM)[None, :], other=0.0)

    first_position = length - end + first_token
    last = length if not CAUSAL else length - end + tl.minimum(first_token + BLOCK_T, end)
    begin, stop = find_split(_first_visible(first_position, WINDOW, CHUNK), last, BLOCK_K)
    whole = begin  # up to here every row sees every key, and blocks are full
    UNMASKED: tl.constexpr = BLOCK_M >= 64 and WINDOW is None and CHUNK is None
    if UNMASKED:
        whole += tl.maximum((tl.minimum(stop, first_position + 1) if CAUSAL else stop) - begin, 0) // BLOCK_K * BLOCK_K

    rows = token.to(tl.int64) * NUM_HEADS + head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + token * SINKS_STRIDE + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        top = tl.where(split == 0, sink, top)
        total += tl.where(split == 0, 1.0, 0.0)
    slope = None if slopes is None else tl.load(slopes + head, mask=is_row, other=0.0).to(tl.float32)
    logits = None if distance_logits is None else distance_logits + tl.where(is_row, rows, 0) * NUM_DISTANCES
    state = tl.zeros([BLOCK_M, BLOCK_V], tl.float32), total, top
    for masked in tl.static_range(0 if UNMASKED else 1, 2):
        state = _attend_blocks(
            state, tile, position, begin if masked == 0 else whole, whole if masked == 0 else stop,
            key_cache, value_cache, kv_head, page_table, sequence, page_table_width, slope, logits, SCALE, CAUSAL,
            WINDOW, CHUNK, SOFTCAP, NUM_DISTANCES, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_V, PAGE_SIZE, BLOCK_K,
            masked == 1,
        )  # fmt: skip
    store_rows(out, partial, sums, rows, is_row, state[0], state[1], state[2], VALUE_DIM, IS_SPLIT)


_KEY = ("IS_SPLIT", "BLOCK_M", "NUM_HEADS", "NUM_KV_HEADS", "HEAD_DIM", "VALUE_DIM", "PAGE_SIZE", "WINDOW")
_decode = Launcher(_attend, configurations((64, 4, 3), (64, 4, 5), (128, 8, 3)), _KEY)
_prefill = Launcher(_attend, configurations((64, 8, 3), (32, 8, 3)), _KEY)
_wide_float32 = Launcher(_attend, configurations((16, 4, 2)), _KEY)  # unrolled: larger blocks compile for minutes


def _supports(
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
) -> str | None:
    heads, kv_heads, widths = query.shape[2], key.shape[2], (key.shape[3], value.shape[3])
    if heads % kv_heads or heads // kv_heads > _MOST_ROWS:
        return f"{heads} query heads over {kv_heads} key-value heads; there are kernels for 1 to {_MOST_ROWS} each"
    if max(widths) * query.dtype.itemsize > _MOST_WIDTH_BYTES:
        return f"heads of {max(widths)} {query.dtype}; there are kernels up to {_MOST_WIDTH_BYTES} bytes"
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        return "caches with gaps"
    caches = [cache for cache in (key_cache, value_cache) if not is_float8(cache.dtype)]
    return why_refused(query, key, value, *caches) or why_not_kept(key_cache, value_cache)


@cached_attention.kernel("triton", _supports)
def cached_attention_triton(
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
    """`cached_attention` that writes new keys and values to their pages and attends to all of them there."""
    write_entries(key, key_cache, slot_mapping, value, value_cache)
    facts = (sinks, scale, causal, sliding_window, chunk_size, softcap, slopes, distance_logits)
    return attend_to_pages(query, cu_seqlens, *facts, seq_lens, page_table, key_cache, value_cache)


def attend_to_pages(
    query: Tensor,
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
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """`cached_attention` once the new keys and values are in their pages; the arguments are its own."""
    query = query if query.stride(3) == 1 else query.contiguous()
    _, num_tokens, num_heads, head_dim = query.shape
    num_sequences, page_table_width = page_table.shape
    _, page_size, num_kv_heads, value_dim = value_cache.shape
    out = query.new_empty(1, num_tokens, num_heads, value_dim)

    width = max(head_dim, value_dim)
    is_wide_float32 = width > 64 and query.dtype == torch.float32
    most_rows = 32 if is_wide_float32 else _MOST_ROWS if width <= 128 else 64
    block_m, block_t = tokens_per_tile(num_tokens, num_sequences, num_heads // num_kv_heads, most_rows)
    tiles = most_tiles(num_tokens, num_sequences, block_t)
    splits = Splits(out, num_splits(tiles * num_kv_heads, page_table_width * page_size, query.device))
    attend = _wide_float32 if is_wide_float32 else _decode if block_m < 64 else _prefill
    attend(
        (tiles, num_kv_heads, splits.count),
        *(
            query,
            key_cache,
            value_cache,
            out,
            splits.partial,
            splits.sums,
            cu_seqlens,
            seq_lens,
            page_table.contiguous(),
        ),
        *(sinks, slopes, None if distance_logits is None else distance_logits.contiguous()),
        *(num_sequences, page_table_width, query.stride(1), query.stride(2)),
        **{"SCALE": scale, "CAUSAL": causal, "WINDOW": sliding_window, "CHUNK": chunk_size, "SOFTCAP": softcap},
        NUM_DISTANCES=0 if distance_logits is None else distance_logits.shape[3],
        SINKS_STRIDE=0 if sinks is None or sinks.dim() == 1 else num_heads,
        **{"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "VALUE_DIM": value_dim},
        BLOCK_H=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        **{"PAGE_SIZE": page_size, "BLOCK_M": block_m, "BLOCK_T": block_t, "IS_SPLIT": splits.count > 1},
    )
    splits.combine()
    return out
