"""cached_linear_recurrence and cached_wkv over slot states: a block of channels of one sequence, token by token.

Sources: RG-LRU (arXiv 2402.19427) and the numerically stable WKV (arXiv 2305.13048, appendix).
"""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher
from autodeploy.kernels.triton.sequences import by_token, why_not
from autodeploy.ops.linear_recurrence import cached_linear_recurrence
from autodeploy.ops.wkv import NOTHING, cached_wkv

_BLOCK = 128
EMPTY = tl.constexpr(NOTHING)


@triton.jit
def _recur_linearly(
    x, gate, state, out, cu_seqlens, state_slots, x_stride, gate_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    place = tl.load(state_slots + sequence).to(tl.int64) * CHANNELS + channel
    memory = tl.load(state + place, mask=mask, other=0.0).to(tl.float32)
    for at in range(begin, end):
        kept = tl.load(gate + at * gate_stride + channel, mask=mask, other=0.0).to(tl.float32)
        memory = kept * memory + tl.load(x + at * x_stride + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at * CHANNELS + channel, memory.to(out.dtype.element_ty), mask=mask)
    tl.store(state + place, memory.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _with_token(sums, weights, level, key, value):
    """A weighted sum of values, the sum of the weights, and the logarithm both are relative to, with one more value."""
    highest = tl.maximum(level, key)
    earlier, own = tl.exp(level - highest), tl.exp(key - highest)
    return earlier * sums + own * value, earlier * weights + own, highest


@triton.jit
def _recur_by_weights(
    key, value, decay, bonus, state, out, cu_seqlens, state_slots, key_stride, value_stride, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    fade = tl.load(decay + channel, mask=mask, other=0.0).to(tl.float32)
    extra = tl.load(bonus + channel, mask=mask, other=0.0).to(tl.float32)
    place = state + tl.load(state_slots + sequence).to(tl.int64) * (3 * CHANNELS) + channel
    sums = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    weights = tl.load(place + CHANNELS, mask=mask, other=0.0).to(tl.float32)
    level = tl.load(place + 2 * CHANNELS, mask=mask, other=0.0).to(tl.float32)
    level = tl.where(weights > 0, level, EMPTY)
    for at in range(begin, end):
        k = tl.load(key + at * key_stride + channel, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(value + at * value_stride + channel, mask=mask, other=0.0).to(tl.float32)
        mixed, total, _ = _with_token(sums, weights, level, k + extra, v)
        tl.store(out + at * CHANNELS + channel, (mixed / total).to(out.dtype.element_ty), mask=mask)
        sums, weights, level = _with_token(sums, weights, level + fade, k, v)
    tl.store(place, sums.to(state.dtype.element_ty), mask=mask)
    tl.store(place + CHANNELS, weights.to(state.dtype.element_ty), mask=mask)
    tl.store(place + 2 * CHANNELS, level.to(state.dtype.element_ty), mask=mask)


_linear, _wkv = Launcher(_recur_linearly), Launcher(_recur_by_weights)


def _linear_supports(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> str | None:
    return why_not(cu_seqlens, state, (x, gate))


@cached_linear_recurrence.kernel("triton", _linear_supports)
def cached_linear_recurrence_triton(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> Tensor:
    """`cached_linear_recurrence`, one pass over the row."""
    x, gate, out = by_token(x), by_token(gate), x.new_empty(x.shape)
    channels = x.shape[2]
    grid = (state_slots.numel(), triton.cdiv(channels, _BLOCK))
    given = (x, gate, state, out, cu_seqlens, state_slots, x.stride(1), gate.stride(1))
    _linear(grid, *given, CHANNELS=channels, BLOCK=_BLOCK)
    return out


def _wkv_supports(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    memory: Tensor,
) -> str | None:
    return why_not(cu_seqlens, memory, (key, value), decay, bonus)


@cached_wkv.kernel("triton", _wkv_supports)
def cached_wkv_triton(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    memory: Tensor,
) -> Tensor:
    """`cached_wkv`, one pass over the row."""
    key, value, out = by_token(key), by_token(value), value.new_empty(value.shape)
    channels = value.shape[2]
    grid = (state_slots.numel(), triton.cdiv(channels, _BLOCK))
    given = (key, value, decay.contiguous(), bonus.contiguous(), memory, out, cu_seqlens, state_slots)
    _wkv(grid, *given, key.stride(1), value.stride(1), CHANNELS=channels, BLOCK=_BLOCK)
    return out
