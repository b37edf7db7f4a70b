"""cached_rope_attention: one launch turns queries, turns keys into their pages and writes values; then attention.

Bits are those of the kernels of `rope` and `cached_attention` one after the other.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.attention import attend_to_pages
from autodeploy.kernels.triton.launch import Launcher
from autodeploy.kernels.triton.paged import largest_of, sizes_of_entries, write_entry
from autodeploy.kernels.triton.rope import blocks_of_heads, turn_heads
from autodeploy.ops.attention import cached_attention
from autodeploy.ops.rope import rope
from autodeploy.ops.rope_attention import cached_rope_attention


@triton.jit
def _turn_and_write(
    query, key, value, cos, sin, turned, key_cache, value_cache, slot_mapping, num_query_heads, num_key_heads,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    KEY_LARGEST: tl.constexpr, ENTRY: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    first_key = tl.cdiv(num_query_heads, HEADS) * HEADS
    first_value = first_key + tl.cdiv(num_key_heads, HEADS) * HEADS
    if head < first_key:
        turn_heads(
            *(query, turned, cos, sin, token, token, head, num_query_heads, query_token_stride, query_head_stride),
            *(WIDTH, ROTARY, HEADS, HALF, REST, None),
        )
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if head < first_value:
            turn_heads(
                *(key, key_cache, cos, sin, token, slot, head - first_key, num_key_heads),
                *(key_token_stride, key_head_stride, WIDTH, ROTARY, HEADS, HALF, REST, KEY_LARGEST),
            )
        else:
            write_entry(
                *(value, value_cache, token, slot, value_token_stride, value_head_stride),
                *(ENTRY, NUM_HEADS, DIM, BLOCK, LARGEST),
            )


_turn = Launcher(_turn_and_write)


def _supports(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **others: Any) -> str | None:
    turning, attending = (op.kernels["triton"].supports for op in (rope, cached_attention))
    return turning(query=query, key=key, cos=cos, sin=sin) or attending(query=query, key=key, **others)


@cached_rope_attention.kernel("triton", _supports)
def cached_rope_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
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
    """`cached_rope_attention` that attends to the pages once keys and values are there."""
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    turned, heads = query.new_empty(query.shape), (query.shape[2], key.shape[2])
    blocks = blocks_of_heads(query, cos)
    _turn(
        (query.shape[1], sum(triton.cdiv(count, blocks["HEADS"]) for count in heads) + 1),
        *(query, key, value, cos.contiguous(), sin.contiguous(), turned, key_cache, value_cache, slot_mapping, *heads),
        *(query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
        **blocks,
        KEY_LARGEST=largest_of(key_cache),
        **sizes_of_entries(value, value_cache),
    )
    facts = (sinks, scale, causal, sliding_window, chunk_size, softcap, slopes, distance_logits)
    return attend_to_pages(turned, cu_seqlens, *facts, seq_lens, page_table, key_cache, value_cache)
