"""Attention whose queries and keys are turned first: `rope` and `attention` as one op, and its twin over pages.

Whoever has a kernel of the twin turns keys straight into their pages; what is computed is what the two ops compute.
"""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.attention import (
    attention,
    attention_samples,
    attention_states,
    attention_work,
    cached_attention,
)
from autodeploy.ops.op import op
from autodeploy.ops.rope import rope

_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.shape[-1])


@op(tolerance=_TOLERANCE, opaque=True, fake=_fake)
def rope_attention(
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
) -> Tensor:
    """`attention` of queries and keys that `rope` has turned.

    Args:
        query: `[1, T, N, H]`. key: `[1, T, K, H]`. value: `[1, T, K, V]`.
        cos, sin: `[1, T, R]` with R <= H, as in `rope`. The others as in `attention`.
    Returns:
        `[1, T, N, V]`.
    """
    query, key = rope.reference(query, key, cos, sin)
    facts: Any = (sinks, scale, causal, sliding_window, chunk_size, softcap, slopes, distance_logits)
    output: Tensor = attention.reference(query, key, value, cu_seqlens, *facts)
    return output


@op(tolerance=_TOLERANCE, opaque=True, mutates=("key_cache", "value_cache"), fake=_fake)
def cached_rope_attention(
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
    """`cached_attention` of queries and keys that `rope` has turned; pages hold turned keys.

    Args:
        query, key, value: the new tokens, `[1, T, N, H]`, `[1, T, K, H]`, `[1, T, K, V]`.
        cos, sin: `[1, T, R]` with R <= H, as in `rope`. The others as in `cached_attention`.
    Returns:
        `[1, T, N, V]`.
    """
    query, key = rope.reference(query, key, cos, sin)
    facts: Any = (sinks, scale, causal, sliding_window, chunk_size, softcap, slopes, distance_logits)
    pages: Any = (seq_lens, page_table, slot_mapping, key_cache, value_cache)
    output: Tensor = cached_attention.reference(query, key, value, cu_seqlens, *facts, *pages)
    return output


rope_attention.with_states(cached_rope_attention)(attention_states)
rope_attention.with_work(attention_work)
cached_rope_attention.with_work(attention_work)


@rope_attention.with_samples
def _samples() -> list[dict[str, Any]]:
    """Some of `attention`, with heads that are turned whole and in part."""

    def turned(sample: dict[str, Any], rotary_dim: int) -> dict[str, Any]:
        angle = torch.randn(1, 24, rotary_dim // 2).repeat(1, 1, 2)
        return sample | {"cos": angle.cos(), "sin": angle.sin()}

    plain, with_window, *_ = attention_samples()
    return [turned(plain, 16), turned(with_window, 8), turned(plain | {"value": torch.randn(1, 24, 2, 8)}, 16)]
