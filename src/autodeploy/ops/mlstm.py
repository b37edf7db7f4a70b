"""The matrix memory of an xLSTM with exponential gates, whole and over slot states.

Shapes: T tokens in the packed row, N heads, H dimensions of query and key, V of value.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

CHUNK = 64
"""tokens whose gates become one matrix"""


def _recur(
    state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """state: `[S, N, H + 1, V + 1]`: the memory, its normaliser as a last column, the scale of both in the corner."""
    dtype = value.dtype
    parts = [part.float().transpose(1, 2) for part in (query * scale, key, value, input_gate, forget_gate)]
    memory, level = state[:, :, :-1].float(), state[:, :, -1, -1].float()
    outputs = []
    for start in range(0, key.shape[1], CHUNK):
        q, k, v, i, f = (part[:, :, start : start + CHUNK] for part in parts)
        output, memory, level = _chunk(memory, level, q, k, F.pad(v, (0, 1), value=1.0), i, F.logsigmoid(f), eps)
        outputs.append(output)
    after = torch.zeros_like(state)
    after[:, :, :-1], after[:, :, -1, -1] = memory, level
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), after


def _chunk(
    memory: Tensor, level: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, decay: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk. memory: `[S, N, H, V + 1]`, times exp(level) `[S, N]`; gate and decay: logarithms, `[S, N, L]`."""
    total = decay.cumsum(-1)
    weights = total.unsqueeze(-1) - total.unsqueeze(-2) + gate.unsqueeze(-2)
    weights = weights.masked_fill(torch.ones_like(weights[0, 0]).triu(1).bool(), float("-inf"))
    before = total + level.unsqueeze(-1)
    levels = torch.maximum(before, weights.max(-1).values)
    scores = (query @ key.transpose(-1, -2)) * torch.exp(weights - levels.unsqueeze(-1))
    mixed = scores @ value + (query * torch.exp(before - levels).unsqueeze(-1)) @ memory
    size = torch.maximum(mixed[..., -1:].abs(), torch.exp(-levels).unsqueeze(-1)) + eps
    last = levels[..., -1]
    fresh = torch.exp(total[..., -1:] - total + gate - last.unsqueeze(-1))
    kept = torch.exp(before[..., -1] - last)[..., None, None] * memory
    return mixed[..., :-1] / size, kept + (key * fresh.unsqueeze(-1)).transpose(-1, -2) @ value, last


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda query, key, value, *_: value.new_empty(value.shape))
def mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    scale: float,
    eps: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """C_t = sigmoid(f_t) · C_(t-1) + exp(i_t) · k_t ⊗ v_t, n_t alike with 1 for v_t, and (arXiv 2405.04517)
    o_t = scale · q_t · C_t / (max(|scale · q_t · n_t|, 1) + eps), computed relative to the largest weight so far, at
    least that of an empty memory.

    Args:
        query, key: `[1, T, N, H]`. value: `[1, T, N, V]`.
        input_gate, forget_gate: before their functions, `[1, T, N]`.
    Returns:
        `[1, T, N, V]`.
    """
    recur = partial(_recur, scale=scale, eps=eps)
    shape = (value.shape[2], key.shape[3] + 1, value.shape[3] + 1)
    return over_sequences(recur, [query, key, value, input_gate, forget_gate], cu_seqlens, shape)


@op(
    tolerance=_TOLERANCE,
    opaque=True,
    mutates=("memory",),
    fake=lambda query, key, value, *_: value.new_empty(value.shape),
)
def cached_mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    scale: float,
    eps: float,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    memory: Tensor,
) -> Tensor:
    """`mlstm` of new tokens `[1, T, ...]`, continued from `memory` `[slots, N, H + 1, V + 1]`."""
    recur = partial(_recur, scale=scale, eps=eps)
    return continue_sequences(recur, [query, key, value, input_gate, forget_gate], cu_seqlens, memory, state_slots)


@mlstm.with_states(cached_mlstm)
def _states(key: Tensor, value: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = (value.shape[2], key.shape[3] + 1, value.shape[3] + 1)
    return {"memory": SlotState(name="memory", shape=shape, dtype=torch.float32)}


@mlstm.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 83], dtype=torch.int32)
    plain: dict[str, Any] = {
        "query": torch.randn(1, 83, 2, 8),
        "key": torch.randn(1, 83, 2, 8),
        "value": torch.randn(1, 83, 2, 6),
        "input_gate": torch.randn(1, 83, 2),
        "forget_gate": torch.randn(1, 83, 2) + 3,
        "scale": 8**-0.5,
        "eps": 1e-6,
        "cu_seqlens": boundaries,
    }
    return [plain, plain | {"input_gate": 10 * torch.randn(1, 83, 2), "forget_gate": 5 * torch.randn(1, 83, 2)}]
