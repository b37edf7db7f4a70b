"""cached_causal_conv: tiles of tokens and channels side by side, each reading the few tokens before it.

Windows are moved on when nobody reads them any more: by the same program where one program has all of a sequence's
tokens, as in a decode step, by a launch of its own after the tiles of a prompt. The maths is a sum over taps.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher, row_key
from autodeploy.kernels.triton.paged import find_tile, most_tiles
from autodeploy.kernels.triton.sequences import by_token, goes_one_by_one, why_not
from autodeploy.ops.causal_conv import cached_causal_conv

_BLOCK_CHANNELS = 128


@triton.jit
def _convolve(
    x, weight, bias, window, out, begin, token, end, slot, channel, x_stride, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The results of tokens `[T]` and channels `[C]` of a sequence whose new tokens are `begin` to `end`."""
    is_channel = channel < CHANNELS
    mask = (token < end)[:, None] & is_channel[None, :]
    sum = tl.zeros([token.shape[0], channel.shape[0]], tl.float32)
    if bias is not None:
        sum += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        seen = token - (TAPS - 1 - tap)
        is_new = (seen >= begin)[:, None]
        value = tl.load(x + seen[:, None] * x_stride + channel[None, :], mask=mask & is_new, other=0.0).to(tl.float32)
        if tap < TAPS - 1:
            kept = slot * (TAPS - 1) + (TAPS - 1 + seen - begin)
            before = tl.load(window + kept[:, None] * CHANNELS + channel[None, :], mask=mask & ~is_new, other=0.0)
            value += before.to(tl.float32)
        sum += value * tl.load(weight + channel * TAPS + tap, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if SILU:
        sum *= tl.sigmoid(sum)
    tl.store(out + token[:, None] * CHANNELS + channel[None, :], sum.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "ROWS_KEY"])
def _convolve_tiles(
    x, weight, bias, window, out, cu_seqlens, state_slots, num_sequences, x_stride, ROWS_KEY, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sequence, first, end = find_tile(cu_seqlens, num_sequences, tl.program_id(0), BLOCK_T)
    if first >= end:
        return
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    slot = tl.load(state_slots + sequence).to(tl.int64)
    token = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    _convolve(x, weight, bias, window, out, begin, token, end, slot, channel, x_stride, SILU, CHANNELS, TAPS)


@triton.jit
def _convolve_sequences(
    x, weight, bias, window, out, cu_seqlens, state_slots, x_stride, SILU: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, WITH_RESULTS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    slot = tl.load(state_slots + sequence).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WITH_RESULTS:
        for first in range(begin, end):
            token = first + tl.arange(0, 1)
            _convolve(x, weight, bias, window, out, begin, token, end, slot, channel, x_stride, SILU, CHANNELS, TAPS)
    place = tl.arange(0, BLOCK_W)
    mask = (place < TAPS - 1)[:, None] & (channel < CHANNELS)[None, :]
    token = end - (TAPS - 1) + place
    is_new = (token >= begin)[:, None]
    newest = tl.load(x + token[:, None] * x_stride + channel[None, :], mask=mask & is_new, other=0.0)
    kept = slot * (TAPS - 1) + (end - begin) + place
    older = tl.load(window + kept[:, None] * CHANNELS + channel[None, :], mask=mask & ~is_new, other=0.0)
    tl.debug_barrier()  # what other threads read of the window is read before it is overwritten
    kept = slot * (TAPS - 1) + place
    tl.store(window + kept[:, None] * CHANNELS + channel[None, :], tl.where(is_new, newest, older), mask=mask)


def _tile(tokens: int, channels: int, num_warps: int) -> Any:
    """A configuration: what a program takes of a row."""
    return triton.Config({"BLOCK_T": tokens, "BLOCK_C": channels}, num_warps=num_warps)


_tiles = Launcher(
    _convolve_tiles,
    [_tile(16, 128, num_warps=4), _tile(32, 64, num_warps=4), _tile(64, 128, num_warps=8)],
    key=("CHANNELS", "TAPS", "ROWS_KEY"),
)
_sequences = Launcher(_convolve_sequences)


def _supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    window: Tensor,
) -> str | None:
    if activation not in (None, "silu"):
        return f"activation {activation!r}; there are kernels for silu and none"
    return why_not(cu_seqlens, window, (x, window), weight, bias)


@cached_causal_conv.kernel("triton", _supports)
def cached_causal_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    window: Tensor,
) -> Tensor:
    """`cached_causal_conv`, rounded once at the end."""
    x, out, weight = by_token(x), x.new_empty(x.shape), weight.contiguous()
    _, num_tokens, channels = x.shape
    num_sequences, taps = state_slots.numel(), weight.shape[1]
    sizes = {"SILU": activation == "silu", "CHANNELS": channels, "TAPS": taps}
    given = (x, weight, bias, window, out, cu_seqlens, state_slots)
    is_step = goes_one_by_one(num_tokens, state_slots)
    if not is_step:
        _tiles(
            lambda values: (
                most_tiles(num_tokens, num_sequences, values["BLOCK_T"]),
                triton.cdiv(channels, values["BLOCK_C"]),
            ),
            *(*given, num_sequences, x.stride(1)),
            **sizes,
            ROWS_KEY=row_key(num_tokens),
        )
    if is_step or taps > 1:
        sizes |= {"BLOCK_C": _BLOCK_CHANNELS, "BLOCK_W": triton.next_power_of_2(max(taps - 1, 1))}
        grid = (num_sequences, triton.cdiv(channels, _BLOCK_CHANNELS))
        _sequences(grid, *given, x.stride(1), **sizes, WITH_RESULTS=is_step)
    return out
