"""Linear attention whose memory fades (lightning attention, retention, gated linear attention, time mixing with matrix
states), and its cached twin.

Shapes: T tokens in the packed row, N heads, H dimensions of query and key, V of value.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

CHUNK = 64
"""tokens that become one product, with one decay per head"""
CHANNEL_CHUNK = 16
"""the same with a decay per channel, whose pairwise decays have one more dimension"""


def _recur(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, *, bonus: Tensor | None
) -> tuple[Tensor, Tensor]:
    """state: `[S, N, H, V]`; the others as in `linear_attention`, `[S, L, ...]`."""
    parts = [part.float().transpose(1, 2) for part in (query, key, value, decay)]
    state, outputs = state.float(), []
    size = CHUNK if decay.shape[-1] == 1 else CHANNEL_CHUNK
    for start in range(0, key.shape[1], size):
        q, k, v, g = (part[:, :, start : start + size] for part in parts)
        total = g.cumsum(2)
        seen = total if bonus is None else total - g  # what has faded when a token reads
        mixed = _scores(q, k, seen, total, earlier=bonus is not None) @ v + (q * seen.exp()) @ state
        if bonus is not None:
            mixed = mixed + (q * bonus.float().unsqueeze(1) * k).sum(-1, keepdim=True) * v
        outputs.append(mixed)
        left = (total[:, :, -1:] - total).exp()
        state = total[:, :, -1].exp().unsqueeze(-1) * state + (k * left).transpose(-1, -2) @ v
    return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), state


def _scores(query: Tensor, key: Tensor, seen: Tensor, total: Tensor, *, earlier: bool) -> Tensor:
    """query_i · key_j, faded from token j to token i, for j up to i, or before i: `[S, N, L, L]`."""
    length = key.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(0 if earlier else 1)
    between = (seen.unsqueeze(3) - total.unsqueeze(2)).masked_fill(later[..., None], float("-inf")).exp()
    if between.shape[-1] == 1:
        return (query @ key.transpose(-1, -2)) * between[..., 0]
    return torch.einsum("snih,snjh,snijh->snij", query, key, between)


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda query, key, value, *_: value.new_empty(value.shape))
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """S_t = exp(decay_t) · S_(t-1) + k_t ⊗ v_t and o_t = q_t · S_t (arXiv 2307.08621, 2401.04658, 2312.06635).

    With a bonus, o_t = q_t · (S_(t-1) + (bonus · k_t) ⊗ v_t): earlier tokens as they were, and this one weighed by
    channel (arXiv 2404.05892).

    Args:
        query, key: `[1, T, N, H]`. value: `[1, T, N, V]`.
        decay: logarithms: `[1, T, N, 1]`, or `[1, T, N, H]` for one per channel. A constant one is expanded.
        bonus: `[N, H]` or None.
    Returns:
        `[1, T, N, V]`.
    """
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return over_sequences(partial(_recur, bonus=bonus), [query, key, value, decay], cu_seqlens, shape)


@op(
    tolerance=_TOLERANCE,
    opaque=True,
    mutates=("state",),
    fake=lambda query, key, value, *_: value.new_empty(value.shape),
)
def cached_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`linear_attention` of new tokens `[1, T, ...]`, continued from `state` `[slots, N, H, V]`."""
    recur = partial(_recur, bonus=bonus)
    return continue_sequences(recur, [query, key, value, decay], cu_seqlens, state, state_slots)


@linear_attention.with_states(cached_linear_attention)
def _states(key: Tensor, value: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return {"state": SlotState(name="state", shape=shape, dtype=torch.float32)}


@linear_attention.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 83], dtype=torch.int32)
    query, key, value = torch.randn(1, 83, 2, 8), torch.randn(1, 83, 2, 8), torch.randn(1, 83, 2, 6)
    plain: dict[str, Any] = {"query": query, "key": key, "value": value, "bonus": None, "cu_seqlens": boundaries}
    constant, channels = -torch.rand(2, 1).expand(1, 83, 2, 1), -4 * torch.rand(1, 83, 2, 8)
    return [
        plain | {"decay": constant},
        plain | {"decay": channels},
        plain | {"decay": channels, "bonus": torch.randn(2, 8)},
    ]
