"""The delta rule: a linear-attention state that is corrected, not only added to; and its twin over slot states.

Shapes: T tokens in the packed row, K key heads, N value heads (N a multiple of K), H key dimension, V value dimension.
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
"""tokens that become one triangular system, with one decay per head"""
CHANNEL_CHUNK = 16
"""the same with a decay per channel, whose pairwise decays have one more dimension"""


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _recur(
    state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    *,
    scale: float,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """state: `[S, N, H, V]`; the others as in `delta_rule`, `[S, L, ...]`."""
    dtype, repeats = value.dtype, value.shape[2] // key.shape[2]
    decay = torch.zeros_like(beta) if decay is None else decay
    decay = decay.unsqueeze(-1) if decay.dim() == 3 else decay
    query, key, value, beta, decay = (part.float().transpose(1, 2) for part in (query, key, value, beta, decay))
    if norm_eps is not None:
        query, key = _normalise(query, norm_eps), _normalise(key, norm_eps)
    query, key = (part.repeat_interleave(repeats, dim=1) for part in (query * scale, key))
    state, outputs = state.float(), []
    size = CHUNK if decay.shape[-1] == 1 else CHANNEL_CHUNK
    for start in range(0, key.shape[2], size):
        parts = (part[:, :, start : start + size] for part in (query, key, value, beta, decay))
        output, state = _chunk(state, *parts)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), state


def _chunk(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: the corrections of its tokens solve a unit triangular system.

    query, key: `[S, N, L, H]`; value: `[S, N, L, V]`; beta: `[S, N, L]`; decay: `[S, N, L, 1 or H]`, logarithms.
    """
    total = decay.cumsum(2)
    fading = total.exp()
    update = beta.unsqueeze(-1) * (value - (key * fading) @ state)
    if key.shape[2] > 1:
        system = beta.unsqueeze(-1) * _scores(key, key, total)
        update = torch.linalg.solve_triangular(system, update, upper=False, unitriangular=True)
    output = (query * fading) @ state + _scores(query, key, total).tril() @ update
    left = (total[:, :, -1:] - total).exp()
    return output, state * fading[:, :, -1].unsqueeze(-1) + (key * left).transpose(-1, -2) @ update


def _scores(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """left_i · right_j, faded from token j to token i: `[S, N, L, L]`; rubbish above the diagonal."""
    if total.shape[-1] == 1:
        return (left @ right.transpose(-1, -2)) * torch.exp(total - total.transpose(-1, -2))
    between = torch.exp(total.unsqueeze(3) - total.unsqueeze(2))
    return torch.einsum("snih,snjh,snijh->snij", left, right, between)


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda query, key, value, *_: value.new_empty(value.shape))
def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    norm_eps: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """S_t = exp(decay_t) · S_(t-1) + beta_t · k_t ⊗ (v_t - k_t · exp(decay_t) · S_(t-1)) and o_t = scale · q_t · S_t.

    Without a decay (arXiv 2406.06484), with one per head (arXiv 2412.06464) or one per channel of the key
    (arXiv 2510.26692).

    Args:
        query, key: `[1, T, K, H]`. value: `[1, T, N, V]`, each key head serving N / K value heads.
        beta: `[1, T, N]`.
        decay: logarithms, `[1, T, N]` or `[1, T, N, H]`, or None.
        norm_eps: query and key are divided by sqrt(sum of squares + norm_eps) first; None leaves them.
    Returns:
        `[1, T, N, V]`.
    """
    recur = partial(_recur, scale=scale, norm_eps=norm_eps)
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return over_sequences(recur, [query, key, value, beta, decay], cu_seqlens, shape)


@op(
    tolerance=_TOLERANCE,
    opaque=True,
    mutates=("state",),
    fake=lambda query, key, value, *_: value.new_empty(value.shape),
)
def cached_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    norm_eps: float | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`delta_rule` of new tokens `[1, T, ...]`, continued from `state` `[slots, N, H, V]`."""
    recur = partial(_recur, scale=scale, norm_eps=norm_eps)
    return continue_sequences(recur, [query, key, value, beta, decay], cu_seqlens, state, state_slots)


@delta_rule.with_states(cached_delta_rule)
def _states(key: Tensor, value: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return {"state": SlotState(name="state", shape=shape, dtype=torch.float32)}


@delta_rule.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 83], dtype=torch.int32)
    query, key, value = torch.randn(1, 83, 2, 8), torch.randn(1, 83, 2, 8), torch.randn(1, 83, 4, 6)
    beta = torch.rand(1, 83, 4)
    plain: dict[str, Any] = {"query": query, "key": key, "value": value, "beta": beta, "cu_seqlens": boundaries}
    return [
        plain | {"decay": -torch.rand(1, 83, 4), "scale": 0.3, "norm_eps": 1e-6},
        plain | {"decay": -torch.rand(1, 83, 4, 8) * 4, "scale": 0.3, "norm_eps": 1e-6},
        plain | {"decay": None, "scale": 1.0, "norm_eps": 1e-6},
        plain | {"key": key / 8, "decay": -torch.rand(1, 83, 4), "scale": 0.3, "norm_eps": None},
    ]
