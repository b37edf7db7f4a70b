"""WKV: a softmax over all earlier keys of a channel, faded by distance, as a recurrence; and its twin over slot states.

Shapes: T tokens in the packed row, D channels.
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

NOTHING = -1e38
"""logarithm of the weight of an empty memory"""

Memory = tuple[Tensor, Tensor, Tensor]
"""A weighted sum of values, the sum of the weights, and the logarithm that both are relative to."""


def _joined(earlier: Memory, later: Memory) -> Memory:
    """Two memories as one, relative to the larger of their levels."""
    level = torch.maximum(earlier[2], later[2])
    first, second = torch.exp(earlier[2] - level), torch.exp(later[2] - level)
    return first * earlier[0] + second * later[0], first * earlier[1] + second * later[1], level


def _later(x: Tensor, distance: int, value: float = 0.0) -> Tensor:
    """Rows `[S, L, D]` moved to later tokens; `value` stands before them."""
    return F.pad(x, (0, 0, distance, 0), value=value)[:, : x.shape[1]]


def _recur(state: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """state: `[S, 3, D]`, a memory; zeros are an empty one. key, value: `[S, L, D]`.

    Doubling: after step k every token's memory holds the 2^k tokens up to it.
    """
    k, v, decay, length = key.float(), value.float(), decay.float(), key.shape[1]
    memory: Memory = (v, torch.ones_like(v), k)
    distance = 1
    while distance < length:
        sums, weights, levels = memory
        before = (_later(sums, distance), _later(weights, distance), _later(levels, distance, NOTHING))
        memory = _joined((before[0], before[1], before[2] + distance * decay), memory)
        distance *= 2
    sums, weights, levels = state.float().unsqueeze(2).unbind(1)
    levels = torch.where(weights > 0, levels, NOTHING)
    elapsed = torch.arange(length, device=key.device)[:, None] * decay
    # What a token reads is what its predecessor left: the memory of the tokens here, and the state, faded once less.
    chunk = tuple(_later(part, 1, empty) for part, empty in zip(memory, (0.0, 0.0, NOTHING), strict=True))
    seen = _joined((sums, weights, levels + elapsed), (chunk[0], chunk[1], chunk[2]))
    mixed, total, _ = _joined(seen, (v, torch.ones_like(v), k + bonus.float()))
    after = _joined((sums[:, 0], weights[:, 0], levels[:, 0] + length * decay), tuple(m[:, -1] for m in memory))  # type: ignore[arg-type]
    return (mixed / total).to(value.dtype), torch.stack(after, dim=1)


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda key, value, *_: value.new_empty(value.shape))
def wkv(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """o_t = (Σ_(j<t) w_tj v_j + exp(bonus + k_t) v_t) / (Σ_(j<t) w_tj + exp(bonus + k_t)) per channel, where
    w_tj = exp((t - 1 - j) · decay + k_j), relative to the largest weight so far (arXiv 2305.13048).

    Args:
        key, value: `[1, T, D]`.
        decay: logarithm of what one token leaves of the weights before it, at most 0: `[D]`.
        bonus: added to the token's own key: `[D]`.
    Returns:
        `[1, T, D]`.
    """
    return over_sequences(partial(_recur, decay=decay, bonus=bonus), [key, value], cu_seqlens, (3, value.shape[2]))


@op(tolerance=_TOLERANCE, opaque=True, mutates=("memory",), fake=lambda key, value, *_: value.new_empty(value.shape))
def cached_wkv(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    memory: Tensor,
) -> Tensor:
    """`wkv` of new tokens `[1, T, D]`, continued from `memory` `[slots, 3, D]`: sum, weight and level."""
    recur = partial(_recur, decay=decay, bonus=bonus)
    return continue_sequences(recur, [key, value], cu_seqlens, memory, state_slots)


@wkv.with_states(cached_wkv)
def _states(value: Tensor, **_: Any) -> dict[str, StateSpec]:
    return {"memory": SlotState(name="memory", shape=(3, value.shape[2]), dtype=torch.float32, shard_dim=1)}


@wkv.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 83], dtype=torch.int32)
    plain: dict[str, Any] = {
        "key": 3 * torch.randn(1, 83, 10),
        "value": torch.randn(1, 83, 10),
        "decay": -torch.exp(torch.linspace(-5.0, 3.0, 10)),
        "bonus": torch.randn(10),
        "cu_seqlens": boundaries,
    }
    return [plain, plain | {"key": 60 * torch.randn(1, 83, 10)}]  # weights that no float32 holds
