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
    *(POINTER, INT64, FLOAT, INT, INT64, INT64, FLOAT),  # sinks, scale, causal, window, chunk, softcap
    *(POINTER, POINTER, INT64, INT64),  # slopes, distance_logits, few
    *(POINTER, THREADS),  # out, threads
)
_cached_attention = NativeFunction("cached_attention", _SIGNATURE, INT)

BAD_SIZES = 4
_FAULTS = {
    1: "out of memory for partial results",
    2: "slot_mapping names a slot outside the cache",
    3: "page_table names a page outside the cache",
    BAD_SIZES: "cu_seqlens and seq_lens do not fit the tokens and pages given",
}
"""By `Status` in csrc/attention.h."""

_FEW = 16
"""New tokens of a sequence up to which its keys are read once per token."""
_MANY = (1 << 63) - 1


def why_wrong_tables(cu_seqlens: Tensor, seq_lens: Tensor, page_table: Tensor, slot_mapping: Tensor) -> str | None:
    """The reason that native attention cannot take these batch inputs, or None."""
    for name, tensor in {"cu_seqlens": cu_seqlens, "seq_lens": seq_lens, "page_table": page_table}.items():
        if tensor.dtype != torch.int32:
            return f"{name} is {tensor.dtype}, not torch.int32"
    return None if slot_mapping.dtype == torch.int64 else f"slot_mapping is {slot_mapping.dtype}, not torch.int64"


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
    if wrong := why_wrong_tables(cu_seqlens, seq_lens, page_table, slot_mapping):
        return wrong
    if query.shape[2] % key.shape[2]:
        return f"{query.shape[2]} query heads do not divide among {key.shape[2]} key-value heads"
    return why_refused(query, key, value, distance_logits, key_cache, value_cache)


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
    check("cached_attention", 0 if sizes == (num_sequences, num_sequences, num_tokens) else BAD_SIZES)
    cu_seqlens, seq_lens = cu_seqlens.contiguous(), seq_lens.contiguous()
    page_table, slot_mapping = page_table.contiguous(), slot_mapping.contiguous()
    sinks, slopes = (None if x is None else x.float().contiguous() for x in (sinks, slopes))
    distance_logits = None if distance_logits is None else distance_logits.contiguous()
    one_by_one = slopes is not None or distance_logits is not None or (sinks is not None and sinks.dim() > 1)
    geometry = (num_pages, page_size, num_tokens, num_heads, num_kv_heads, head_dim, value_dim)
    status = _cached_attention[query.dtype](
        *rows(query),
        *rows(key),
        *rows(value),
        *(cu_seqlens.data_ptr(), seq_lens.data_ptr(), num_sequences),
        *(page_table.data_ptr(), page_table_width, slot_mapping.data_ptr()),
        *(key_cache.data_ptr(), value_cache.data_ptr(), *geometry),
        *(pointer(sinks), 0 if sinks is None or sinks.dim() == 1 else num_heads, scale, causal),
        *(sliding_window or 0, chunk_size or 0, softcap or 0.0, pointer(slopes)),
        *(pointer(distance_logits), 0 if distance_logits is None else distance_logits.shape[3]),
        _MANY if one_by_one else _FEW,
        *(out.data_ptr(), torch.get_num_threads()),
    )
    check("cached_attention", status)
    return out


def check(name: str, status: int) -> None:
    """Raise what native attention found.

    Raises:
        IndexError: the batch inputs do not fit the cache; nothing outside it was read or written.
    """
    if status:
        raise IndexError(f"{name}: {_FAULTS[status]}; the batch inputs of a step contradict each other")


def rows(x: Tensor) -> tuple[int, int, int]:
    """Where the tokens' heads are, and how far tokens and heads lie apart."""
    _, token_stride, head_stride, _ = x.stride()
    return x.data_ptr(), token_stride, head_stride
