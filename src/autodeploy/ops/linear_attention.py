"""Linear attention whose memory fades (lightning attention, retention, gated linear attention), and its cached twin.

Shapes: T tokens in the packed row, N heads, H dimensions of query and key, V of value.
"""

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


def _recur(state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """state: `[S, N, H, V]`; the others as in `linear_attention`, `[S, L, ...]`."""
    parts = [part.float().transpose(1, 2) for part in (query, key, value, decay)]
    state, outputs = state.float(), []
    size = CHUNK if decay.shape[-1] == 1 else CHANNEL_CHUNK
    for start in range(0, key.shape[1], size):
        q, k, v, g = (part[:, :, start : start + size] for part in parts)
        total = g.cumsum(2)
        between = total.unsqueeze(3) - total.unsqueeze(2)  # from token j to token i; positive only where i < j
        between = between.clamp(max=0.0).exp()
        if g.shape[-1] == 1:
            scores = (q @ k.transpose(-1, -2)) * between[..., 0]
        else:
            scores = torch.einsum("snih,snjh,snijh->snij", q, k, between)
        outputs.append((q * total.exp()) @ state + scores.tril() @ v)
        left = (total[:, :, -1:] - total).exp()
        state = total[:, :, -1].exp().unsqueeze(-1) * state + (k * left).transpose(-1, -2) @ v
    return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), state


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda query, key, value, *_: value.new_empty(value.shape))
def linear_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """S_t = exp(decay_t) · S_(t-1) + k_t ⊗ v_t and o_t = q_t · S_t (arXiv 2307.08621, 2401.04658, 2312.06635).

    Args:
        query, key: `[1, T, N, H]`. value: `[1, T, N, V]`.
        decay: logarithms, at most 0: `[1, T, N, 1]`, or `[1, T, N, H]` for one per channel. A constant one is expanded.
    Returns:
        `[1, T, N, V]`.
    """
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return over_sequences(_recur, [query, key, value, decay], cu_seqlens, shape)


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
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`linear_attention` of new tokens `[1, T, ...]`, continued from `state` `[slots, N, H, V]`."""
    return continue_sequences(_recur, [query, key, value, decay], cu_seqlens, state, state_slots)


@linear_attention.with_states(cached_linear_attention)
def _states(key: Tensor, value: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return {"state": SlotState(name="state", shape=shape, dtype=torch.float32)}


@linear_attention.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 83], dtype=torch.int32)
    query, key, value = torch.randn(1, 83, 2, 8), torch.randn(1, 83, 2, 8), torch.randn(1, 83, 2, 6)
    plain: dict[str, Any] = {"query": query, "key": key, "value": value, "cu_seqlens": boundaries}
    constant = -torch.rand(2, 1).expand(1, 83, 2, 1)
    return [plain | {"decay": constant}, plain | {"decay": -4 * torch.rand(1, 83, 2, 8)}]
