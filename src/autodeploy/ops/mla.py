"""Multi-head latent attention: all heads' keys and values come from one small latent per token, which is what is kept.

N heads; P dimensions of a head's query and key come from the latent of width C, R further ones of the key are shared by
all heads; V dimensions of a value.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.attention import attend, read_pages, write_entries
from autodeploy.ops.op import op
from autodeploy.ops.state import PagedState, StateSpec

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def _fake(query: Tensor, latent: Tensor, shared_key: Tensor, up: Tensor, cu_seqlens: Tensor, *rest: Any) -> Tensor:
    num_heads, width = query.shape[2:]
    value_dim = up.shape[0] // num_heads - (width - shared_key.shape[2])
    return latent.new_empty(*query.shape[:3], value_dim)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return attend(query, key, value, None, scale, True, None, None, None, None, None)


@op(tolerance=_TOLERANCE, opaque=True, fake=_fake)
def mla(query: Tensor, latent: Tensor, shared_key: Tensor, up: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Causal attention within each packed sequence, with `[key, value] = up @ latent` per head (arXiv 2405.04434).

    Args:
        query: `[1, T, N, P + R]`. latent: `[1, T, C]`. shared_key: `[1, T, R]`, the last R of every head's key.
        up: `[N · (P + V), C]`, for each head its key's rows and then its value's.
    Returns:
        `[1, T, N, V]`.
    """
    num_heads, width = query.shape[2:]
    own = width - shared_key.shape[2]
    key, value = (latent @ up.T).unflatten(-1, (num_heads, -1)).tensor_split([own], dim=-1)
    key = torch.cat((key, shared_key.unsqueeze(2).expand(-1, -1, num_heads, -1)), dim=-1)
    parts = [
        _causal(query[0, start:end], key[0, start:end], value[0, start:end], scale)
        for start, end in itertools.pairwise(cu_seqlens.tolist())
        if end > start
    ]
    return torch.cat(parts).unsqueeze(0)


def absorbed_query(query: Tensor, up: Tensor, latent_dim: int, shared_dim: int) -> Tensor:
    """`[.., N, P + R]` as queries to latents, `[.., N, C + R]`: each head's key rows move to its query."""
    num_heads, width = query.shape[-2:]
    rows = up.view(num_heads, -1, latent_dim)[:, : width - shared_dim]
    own, shared = query.split([width - shared_dim, shared_dim], dim=-1)
    return torch.cat((torch.einsum("...np,npc->...nc", own, rows), shared), dim=-1)


def values_of(mixed: Tensor, up: Tensor, own_dim: int) -> Tensor:
    """Mixtures of latents `[.., N, C]` as mixtures of values `[.., N, V]`."""
    rows = up.view(mixed.shape[-2], -1, mixed.shape[-1])[:, own_dim:]
    return torch.einsum("...nc,nvc->...nv", mixed, rows)


@op(tolerance=_TOLERANCE, opaque=True, mutates=("latent_cache",), fake=_fake)
def cached_mla(
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
    """`mla` over pages that hold a latent and a shared key per token; attention runs on the latents themselves.

    Args:
        cu_seqlens: int `[S+1]`, new tokens of each sequence. seq_lens: int `[S]`, tokens including the new ones.
        page_table: int `[S, P]`. slot_mapping: int `[T]`, where each new token's entry goes.
        latent_cache: `[pages, page_size, 1, C + R]`, of the query's dtype or float8.
    Returns:
        `[1, T, N, V]`.
    """
    latent_dim, shared_dim = latent.shape[2], shared_key.shape[2]
    write_entries(latent_cache, slot_mapping, torch.cat((latent, shared_key), dim=-1)[0].unsqueeze(1))
    page_size = latent_cache.shape[1]
    absorbed = absorbed_query(query[0], up, latent_dim, shared_dim)
    mixed = latent.new_zeros(*absorbed.shape[:2], latent_dim)
    for index, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if end == start:
            continue
        length = int(seq_lens[index])
        pages = page_table[index, : -(-length // page_size)]
        kept = read_pages(latent_cache, pages, query.dtype)[:length]
        mixed[start:end] = _causal(absorbed[start:end], kept, kept[..., :latent_dim], scale)
    return values_of(mixed, up, query.shape[3] - shared_dim).unsqueeze(0).contiguous()  # as a compiler was told


@mla.with_states(cached_mla)
def _states(latent: Tensor, shared_key: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = 1, latent.shape[2] + shared_key.shape[2]
    spec = PagedState(name="latent_cache", shape=shape, dtype=latent.dtype, shard_dim=None, may_be_rounded=True)
    return {"latent_cache": spec}


@mla.with_samples
def _samples() -> list[dict[str, Any]]:
    def sample(own: int, shared: int, latent: int, value: int) -> dict[str, Any]:
        return {
            "query": torch.randn(1, 24, 4, own + shared),
            "latent": torch.randn(1, 24, latent),
            "shared_key": torch.randn(1, 24, shared),
            "up": torch.randn(4 * (own + value), latent) * latent**-0.5,
            "cu_seqlens": torch.tensor([0, 1, 10, 24], dtype=torch.int32),
            "scale": 0.25,
        }

    return [sample(16, 8, 12, 16), sample(5, 4, 9, 7)]
