"""The generalised delta rule: what is taken from a linear-attention state and what is put in its place have keys of
their own; and its twin over slot states.

Shapes: T tokens in the packed row, N heads, H dimensions of query and keys, V of value.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 6e-3}

CHUNK = 16
"""tokens that become one triangular system; pairwise decays have the dimension of the channels as well"""


def _recur(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, read: Tensor, write: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """state: `[S, N, H, V]`; the others as in `generalized_delta_rule`, `[S, L, ...]`."""
    parts = [part.float().transpose(1, 2) for part in (query, key, value, read, write, decay)]
    state, outputs = state.float(), []
    for start in range(0, key.shape[1], CHUNK):
        output, state = _chunk(state, *(part[:, :, start : start + CHUNK] for part in parts))
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), state


def _chunk(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, read: Tensor, write: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk, `[S, N, L, ...]`: what its tokens read solves a unit triangular system."""
    total = decay.cumsum(2)
    before = total - decay  # a token reads the state before it fades
    between = before.unsqueeze(3) - total.unsqueeze(2)
    found = (read * before.exp()) @ state + _scores(read, key, between).tril(-1) @ value
    if key.shape[2] > 1:
        found = torch.linalg.solve_triangular(
            -_scores(read, write, between).tril(-1), found, upper=False, unitriangular=True
        )
    # From here on reads are values that were put in under other keys.
    keys, values = torch.cat((key, write), dim=2), torch.cat((value, found), dim=2)
    left = total.repeat(1, 1, 2, 1)
    length = key.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=key.device).tril().repeat(1, 2)
    since = (total.unsqueeze(3) - left.unsqueeze(2)).masked_fill(~allowed[..., None], float("-inf"))
    output = (query * total.exp()) @ state + _scores(query, keys, since) @ values
    fading = (total[:, :, -1:] - left).exp()
    return output, total[:, :, -1].exp().unsqueeze(-1) * state + (keys * fading).transpose(-1, -2) @ values


def _scores(left: Tensor, right: Tensor, between: Tensor) -> Tensor:
    """left_i · right_j, faded by `between` `[S, N, I, J, H]`, logarithms: `[S, N, I, J]`."""
    return torch.einsum("snih,snjh,snijh->snij", left, right, between.exp())


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(value.shape)


@op(tolerance=_TOLERANCE, opaque=True, fake=_fake)
def generalized_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """S_t = exp(decay_t) · S_(t-1) + write_t ⊗ (read_t · S_(t-1)) + k_t ⊗ v_t and o_t = q_t · S_t (arXiv 2503.14456).

    Args:
        query, key, read, write: `[1, T, N, H]`. value: `[1, T, N, V]`.
        decay: logarithms, `[1, T, N, H]`.
    Returns:
        `[1, T, N, V]`.
    """
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return over_sequences(_recur, [query, key, value, read, write, decay], cu_seqlens, shape)


@op(tolerance=_TOLERANCE, opaque=True, mutates=("state",), fake=_fake)
def cached_generalized_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`generalized_delta_rule` of new tokens `[1, T, ...]`, continued from `state` `[slots, N, H, V]`."""
    return continue_sequences(_recur, [query, key, value, read, write, decay], cu_seqlens, state, state_slots)


@generalized_delta_rule.with_states(cached_generalized_delta_rule)
def _states(key: Tensor, value: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = (value.shape[2], key.shape[3], value.shape[3])
    return {"state": SlotState(name="state", shape=shape, dtype=torch.float32)}


@generalized_delta_rule.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 50], dtype=torch.int32)
    query, key, value = torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 6)
    read = F.normalize(torch.randn(1, 50, 2, 8), dim=-1)
    return [
        {
            "query": query,
            "key": key,
            "value": value,
            "read": -read,
            "write": read * torch.rand(1, 50, 2, 8),
            "decay": -torch.rand(1, 50, 2, 8),
            "cu_seqlens": boundaries,
        }
    ]
