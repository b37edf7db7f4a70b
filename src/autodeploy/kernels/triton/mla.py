"""cached_mla over pages of latents that are read in place, for decode steps and chunks of prompts alike.

A latent is loaded once as key and as value of all heads of a program; heads' own matrices stand before and behind, at
the query and at the mixture of latents ("absorbed", arXiv 2405.04434). Blocks and splits as in `attention.py`.
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
from autodeploy.ops.attention import is_float8
from autodeploy.ops.mla import cached_mla, values_of

_MOST_ROWS = 32
_MOST_LATENT_BYTES = 1024
"""Widest latent of which a few blocks fit into shared memory."""


@triton.jit(do_not_specialize=["num_sequences", "page_table_width"])
def _attend_latents(
    absorbed, shared_query, cache, out, partial, sums, cu_seqlens, seq_lens, page_table, num_sequences,
    page_table_width, absorbed_token_stride, absorbed_head_stride, shared_token_stride, shared_head_stride,
    SCALE: tl.constexpr, NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, SHARED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    IS_SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    sequence, first_token, end = find_tile(cu_seqlens, num_sequences, tl.program_id(0), BLOCK_T)
    if first_token >= end:
        return
    row = tl.arange(0, BLOCK_M)
    token = (first_token + row // HEADS).to(tl.int64)
    head = tl.program_id(1) * HEADS + row % HEADS
    is_row = (token < end) & (row < BLOCK_T * HEADS) & (head < NUM_HEADS)
    length = tl.load(seq_lens + sequence)
    position = length - end + token
    latent_width, shared_width = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    is_latent, is_shared = latent_width < LATENT, shared_width < SHARED
    place = token[:, None] * absorbed_token_stride + head[:, None] * absorbed_head_stride + latent_width[None, :]
    query = tl.load(absorbed + place, mask=is_row[:, None] & is_latent[None, :], other=0.0)
    place = token[:, None] * shared_token_stride + head[:, None] * shared_head_stride + shared_width[None, :]
    query_shared = tl.load(shared_query + place, mask=is_row[:, None] & is_shared[None, :], other=0.0)

    last = length - end + tl.minimum(first_token + BLOCK_T, end)
    begin, stop = find_split(0, last, BLOCK_K)
    mixed = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(begin, stop, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        inside = keys < stop
        entries = find_entries(page_table, sequence, page_table_width, keys, inside, PAGE_SIZE) * (LATENT + SHARED)
        latent_mask = inside[:, None] & is_latent[None, :]
        latent = tl.load(cache + entries[:, None] + latent_width[None, :], mask=latent_mask, other=0.0)
        shared_mask = inside[None, :] & is_shared[:, None]
        shared_key = tl.load(cache + entries[None, :] + LATENT + shared_width[:, None], mask=shared_mask, other=0.0)
        latent, shared_key = latent.to(query.dtype), shared_key.to(query.dtype)
        scores = dot(query_shared, shared_key, tl.zeros([BLOCK_M, BLOCK_K], tl.float32))
        scores = dot(query, tl.trans(latent), scores) * (SCALE * LOG2_E)
        visible = inside[None, :] & (keys[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        mixed, total, top = softmax_step(mixed, total, top, scores, latent)
    store_rows(out, partial, sums, token * NUM_HEADS + head, is_row, mixed, total, top, LATENT, IS_SPLIT)


_KEY = ("IS_SPLIT", "BLOCK_M", "NUM_HEADS", "LATENT", "SHARED", "PAGE_SIZE")
_attend = Launcher(_attend_latents, configurations((32, 8, 3), (64, 8, 3)), _KEY)


def _supports(
    query: Tensor,
    latent: Tensor,
    shared_key: Tensor,
    up: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    latent_cache: Tensor,
) -> str | None:
    if latent.shape[2] * latent.dtype.itemsize > _MOST_LATENT_BYTES:
        return f"latents of {latent.shape[2]} {latent.dtype}; there are kernels up to {_MOST_LATENT_BYTES} bytes"
    if not latent_cache.is_contiguous():
        return "a cache with gaps"
    caches = [] if is_float8(latent_cache.dtype) else [latent_cache]
    return why_refused(query, latent, shared_key, up, *caches) or why_not_kept(latent_cache)


@cached_mla.kernel("triton", _supports)
def cached_mla_triton(
    query: Tensor,
    latent: Tensor,
    shared_key: Tensor,
    up: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    seq_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor,
    latent_cache: Tensor,
) -> Tensor:
    """`cached_mla` that writes new latents to their pages and attends to all of them there."""
    _, num_tokens, num_heads, width = query.shape
    num_sequences, page_table_width = page_table.shape
    page_size, latent_dim, shared_dim = latent_cache.shape[1], latent.shape[2], shared_key.shape[2]
    latents, shared_keys = latent_cache[..., :latent_dim], latent_cache[..., latent_dim:]
    write_entries(latent.unsqueeze(2), latents, slot_mapping, shared_key.unsqueeze(2), shared_keys)
    query = query if query.stride(3) == 1 else query.contiguous()
    own, shared_query = query[0].split([width - shared_dim, shared_dim], dim=-1)
    key_rows = up.view(num_heads, -1, latent_dim)[:, : width - shared_dim]
    absorbed = torch.bmm(own.transpose(0, 1), key_rows).transpose(0, 1)

    mixed = latent.new_empty(num_tokens, num_heads, latent_dim)
    heads = min(num_heads, _MOST_ROWS)
    block_m, block_t = tokens_per_tile(num_tokens, num_sequences, heads, _MOST_ROWS)
    programs = (most_tiles(num_tokens, num_sequences, block_t), -(-num_heads // heads))
    splits = Splits(mixed, num_splits(programs[0] * programs[1], page_table_width * page_size, query.device))
    _attend(
        (*programs, splits.count),
        *(absorbed, shared_query, latent_cache, mixed, splits.partial, splits.sums),
        *(cu_seqlens, seq_lens, page_table.contiguous(), num_sequences, page_table_width),
        *(*absorbed.stride()[:2], *shared_query.stride()[:2]),
        **{"SCALE": scale, "NUM_HEADS": num_heads, "LATENT": latent_dim, "SHARED": shared_dim},
        BLOCK_C=max(16, triton.next_power_of_2(latent_dim)),
        BLOCK_R=max(16, triton.next_power_of_2(shared_dim)),
        **{"PAGE_SIZE": page_size, "HEADS": heads, "BLOCK_M": block_m, "BLOCK_T": block_t},
        IS_SPLIT=splits.count > 1,
    )
    splits.combine()
    return values_of(mixed, up, width - shared_dim).unsqueeze(0).contiguous()
