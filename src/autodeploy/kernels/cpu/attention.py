"""cached_attention over pages that are read in place, natively for decode steps and for long chunks alike."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import FLOAT, INT, INT64, POINTER, THREADS, NativeFunction, pointer, why_refused
from autodeploy.ops.attention import cached_attention

_ROWS = (POINTER, INT64, INT64)
_SIGNATURE = (
    *(*_ROWS, *_ROWS, *_ROWS),  # query, key, value
    *(POINTER, POINTER, INT64, POINTER, INT64, POINTER),  # cu_seqlens, seq_lens, page_table, slot_mapping
    *(POINTER, POINTER, INT64, INT64),  # caches, pages
    *[INT64] * 5,  # tokens, heads, widths
    *(POINTER, FLOAT, INT, INT64, INT64, FLOAT),  # sinks, scale, causal, window, chunk, softcap
    *(POINTER, THREADS),  # out, threads
)
_cached_attention = NativeFunction("cached_attention", _SIGNATURE, INT)

_BAD_SIZES = 4
_FAULTS = {
    1: "out of memory for partial results",
    2: "slot_mapping names a slot outside the cache",
    3: "page_table names a page outside the cache",
    _BAD_SIZES: "cu_seqlens and seq_lens do not fit the tokens and pages given",
}
"""By `Status` in csrc/attention.cpp."""


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
    wanted = {"cu_seqlens": cu_seqlens, "seq_lens": seq_lens, "page_table": page_table}
    for name, tensor in wanted.items():
        if tensor.dtype != torch.int32:
            return f"{name} is {tensor.dtype}, not torch.int32"
    if slot_mapping.dtype != torch.int64:
        return f"slot_mapping is {slot_mapping.dtype}, not torch.int64"
    if slopes is not None or distance_logits is not None:
        return "scores with a bias by distance are not written in it yet"
    if sinks is not None and sinks.dim() != 1:
        return "sinks that depend on the token are not written in it yet"
    if query.shape[2] % key.shape[2]:
        return f"{query.shape[2]} query heads do not divide among {key.shape[2]} key-value heads"
    return why_refused(query, key, value, key_cache, value_cache)


@cached_attention.kernel("cpu", _supports)
def cached_attention_cpu(
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
    """`cached_attention` that writes new keys and values to their pages and attends to all of them there.

    Raises:
        IndexError: slots, pages or lengths outside the cache; nothing outside it was read or written.
    """
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        facts = (sinks, scale, causal, sliding_window, chunk_size, softcap, slopes, distance_logits)
        tables = (seq_lens, page_table, slot_mapping)
        whole: Tensor = cached_attention.reference(
            query, key, value, cu_seqlens, *facts, *tables, key_cache, value_cache
        )
        return whole
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    _, num_tokens, num_heads, head_dim = query.shape
    num_sequences, page_table_width = page_table.shape
    num_pages, page_size, num_kv_heads, value_dim = value_cache.shape
    out = value.new_empty(1, num_tokens, num_heads, value_dim)
    sizes = (cu_seqlens.numel() - 1, seq_lens.numel(), slot_mapping.numel())
    _check(0 if sizes == (num_sequences, num_sequences, num_tokens) else _BAD_SIZES)
    cu_seqlens, seq_lens = cu_seqlens.contiguous(), seq_lens.contiguous()
    page_table, slot_mapping = page_table.contiguous(), slot_mapping.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    geometry = (num_pages, page_size, num_tokens, num_heads, num_kv_heads, head_dim, value_dim)
    status = _cached_attention[query.dtype](
        *_rows(query),
        *_rows(key),
        *_rows(value),
        *(cu_seqlens.data_ptr(), seq_lens.data_ptr(), num_sequences),
        *(page_table.data_ptr(), page_table_width, slot_mapping.data_ptr()),
        *(key_cache.data_ptr(), value_cache.data_ptr(), *geometry),
        *(pointer(sinks), scale, causal),
        *(sliding_window or 0, chunk_size or 0, softcap or 0.0),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    _check(status)
    return out


def _check(status: int) -> None:
    if status:
        raise IndexError(f"cached_attention: {_FAULTS[status]}; the batch inputs of a step contradict each other")


def _rows(x: Tensor) -> tuple[int, int, int]:
    _, token_stride, head_stride, _ = x.stride()
    return x.data_ptr(), token_stride, head_stride
