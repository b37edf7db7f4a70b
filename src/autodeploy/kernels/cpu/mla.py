"""cached_mla over pages of latents that are read in place, natively where sequences bring few new tokens each."""

from torch import Tensor

from autodeploy.kernels.cpu.attention import BAD_SIZES, check, rows, why_wrong_tables
from autodeploy.kernels.cpu.native import (
    FLOAT,
    INT,
    INT64,
    MIN_WEIGHTS_FOR_THREADS,
    POINTER,
    THREADS,
    NativeFunction,
    num_threads,
    why_refused,
)
from autodeploy.ops.mla import cached_mla

MAX_NEW_TOKENS = 16
"""New tokens of a sequence, on average, up to which each token's context is read for itself; more go to torch."""

_SIGNATURE = (
    *(POINTER, INT64, INT64, POINTER, INT64, POINTER, INT64, POINTER),  # query, latent, shared_key, up
    *(POINTER, POINTER, INT64, POINTER, INT64, POINTER),  # cu_seqlens, seq_lens, page_table, slot_mapping
    *(POINTER, INT64, INT64),  # cache, pages
    *[INT64] * 6,  # tokens, heads, widths
    *(FLOAT, POINTER, POINTER, POINTER, THREADS),  # scale, scratch, out, threads
)
_cached_mla = NativeFunction("cached_mla", _SIGNATURE, INT)


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
    return why_wrong_tables(cu_seqlens, seq_lens, page_table, slot_mapping) or why_refused(
        query, latent, shared_key, up, latent_cache
    )


@cached_mla.kernel("cpu", _supports)
def cached_mla_cpu(
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
    """`cached_mla` that writes new latents to their pages and attends to all of them there.

    Raises:
        IndexError: slots, pages or lengths outside the cache; nothing outside it was read or written.
    """
    _, num_tokens, num_heads, width = query.shape
    num_sequences, page_table_width = page_table.shape
    if num_tokens > MAX_NEW_TOKENS * num_sequences or not latent_cache.is_contiguous():
        whole: Tensor = cached_mla.reference(
            query, latent, shared_key, up, cu_seqlens, scale, seq_lens, page_table, slot_mapping, latent_cache
        )
        return whole
    query, latent, shared_key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, latent, shared_key))
    up = up.contiguous()
    latent_dim, shared_dim = latent.shape[2], shared_key.shape[2]
    own_dim = width - shared_dim
    value_dim = up.shape[0] // num_heads - own_dim
    tables = [table.contiguous() for table in (cu_seqlens, seq_lens, page_table, slot_mapping)]
    sizes = (cu_seqlens.numel() - 1, seq_lens.numel(), slot_mapping.numel())
    check("cached_mla", 0 if sizes == (num_sequences, num_sequences, num_tokens) else BAD_SIZES)
    out = query.new_empty(1, num_tokens, num_heads, value_dim)
    absorbed = query.new_empty(num_tokens, num_heads, latent_dim + shared_dim)
    mixed = query.new_empty(num_tokens, num_heads, latent_dim)
    status = _cached_mla[query.dtype](
        *rows(query),
        *(latent.data_ptr(), latent.stride(1), shared_key.data_ptr(), shared_key.stride(1), up.data_ptr()),
        *(tables[0].data_ptr(), tables[1].data_ptr(), num_sequences),
        *(tables[2].data_ptr(), page_table_width, tables[3].data_ptr()),
        *(latent_cache.data_ptr(), *latent_cache.shape[:2]),
        *(num_tokens, num_heads, own_dim, shared_dim, latent_dim, value_dim),
        *(scale, absorbed.data_ptr(), mixed.data_ptr(), out.data_ptr()),
        num_threads(up.numel(), MIN_WEIGHTS_FOR_THREADS),
    )
    check("cached_mla", status)
    return out
