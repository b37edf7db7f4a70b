"""WKV: a softmax over all earlier keys of a channel, faded by distance, as a recurrence; and its twin over slot states.

Shapes: T tokens in the packed row, D channels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

NOTHING = -1e38
"""logarithm of the weight of an empty memory"""

BLOCK = 16
"""tokens that are gone through one by one; the blocks of a sequence do so side by side, twice: first for their ends"""

Memory = tuple[Tensor, Tensor, Tensor]
"""A weighted sum of values, the sum of the weights, and the logarithm that both are relative to."""


def _joined(earlier: Memory, later: Memory) -> Memory:
    """Two memories as one, relative to the larger of their levels."""
    level = torch.maximum(earlier[2], later[2])
    first, second = torch.exp(earlier[2] - level), torch.exp(later[2] - level)
    return first * earlier[0] + second * later[0], first * earlier[1] + second * later[1], level


def _with_token(memory: Memory, key: Tensor, value: Tensor) -> Memory:
    return _joined(memory, (value, torch.ones_like(value), key))


def _faded(memory: Memory, amount: Tensor) -> Memory:
    return memory[0], memory[1], memory[2] + amount


def _recur(state: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """state: `[S, 3, D]`, a memory; zeros are an empty one. key, value: `[S, L, D]`."""
    k, v, decay, bonus = (part.float() for part in (key, value, decay, bonus))
    sums, weights, level = state.float().unbind(1)
    memory: Memory = (sums, weights, torch.where(weights > 0, level, NOTHING))
    whole, outputs = key.shape[1] // BLOCK * BLOCK, []
    if whole > BLOCK:
        blocks = [part[:, :whole].unflatten(1, (-1, BLOCK)) for part in (k, v)]
        starts, memory = _starts(memory, blocks[0], blocks[1], decay)
        outputs.append(_tokens(starts, blocks[0], blocks[1], decay, bonus)[0].flatten(1, 2))
        k, v = k[:, whole:], v[:, whole:]
    if k.shape[1]:
        output, memory = _tokens(memory, k, v, decay, bonus)
        outputs.append(output)
    return torch.cat(outputs, dim=1).to(value.dtype), torch.stack(memory, dim=1)


def _starts(memory: Memory, key: Tensor, value: Tensor, decay: Tensor) -> tuple[Memory, Memory]:
    """What each of the blocks `[S, B, L, D]` of a sequence starts from, `[S, B, D]`, and what the last one leaves."""
    empty = torch.zeros_like(key[:, :, 0])
    ends: Memory = (empty, empty, torch.full_like(empty, NOTHING))
    for t in range(key.shape[2]):
        ends = _with_token(_faded(ends, decay), key[:, :, t], value[:, :, t])
    starts: list[Memory] = []
    for block in range(key.shape[1]):
        starts.append(memory)
        own = (ends[0][:, block], ends[1][:, block], ends[2][:, block])
        memory = _joined(_faded(memory, key.shape[2] * decay), own)
    sums, weights, levels = (torch.stack(parts, dim=1) for parts in zip(*starts, strict=True))
    return (sums, weights, levels), memory


def _tokens(memory: Memory, key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor) -> tuple[Tensor, Memory]:
    """Token by token. memory: `[..., D]`; key, value: `[..., L, D]`."""
    outputs = []
    for k, v in zip(key.unbind(-2), value.unbind(-2), strict=True):
        mixed, total, _ = _with_token(memory, k + bonus, v)
        outputs.append(mixed / total)
        memory = _with_token(_faded(memory, decay), k, v)
    return torch.stack(outputs, dim=-2), memory


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
