"""cached_ssd and cached_selective_scan over slot states: token by token, or chunk by chunk with matrix products.

A program has a block of channels of one head of one sequence, and goes through all its new tokens with their state in
registers. Sources: Mamba (arXiv 2312.00752), and for chunks Mamba-2 (arXiv 2405.21060, section 6).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.launch import Launcher, row_key
from autodeploy.kernels.triton.sequences import (
    by_token,
    contiguous,
    dot_parts_of,
    dot_with_parts,
    goes_one_by_one,
    why_not,
)
from autodeploy.ops.ssm import cached_selective_scan, cached_ssd

_CHUNK = 64


@triton.jit
def _step_size(dt, dt_bias, SOFTPLUS: tl.constexpr):
    """dt, with its bias and through softplus where asked for, in float32."""
    dt = dt.to(tl.float32)
    if dt_bias is not None:
        dt += dt_bias
    if SOFTPLUS:
        dt = tl.maximum(dt, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(dt)))
    return dt


@triton.jit
def _clamped(dt, LEAST: tl.constexpr, MOST: tl.constexpr):
    dt = tl.maximum(dt, LEAST)
    return dt if MOST is None else tl.minimum(dt, MOST)


@triton.jit
def _ssd_tokens(
    x, dt, A, B, C, D, dt_bias, state, out, cu_seqlens, state_slots, x_stride, dt_stride, B_stride, C_stride,
    SOFTPLUS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    channel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    entry = tl.arange(0, BLOCK_N)
    is_channel, is_entry = channel < DIM, entry < ENTRIES
    place = (tl.load(state_slots + sequence).to(tl.int64) * HEADS + head) * DIM + channel
    place = place[:, None] * ENTRIES + entry[None, :]
    mask = is_channel[:, None] & is_entry[None, :]
    memory = tl.load(state + place, mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32)
    bias = None if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    skip = 0.0 if D is None else tl.load(D + head).to(tl.float32)
    in_group = head // (HEADS // GROUPS) * ENTRIES + entry
    for at in range(begin, end):
        step = _clamped(_step_size(tl.load(dt + at * dt_stride + head), bias, SOFTPLUS), LEAST, MOST)
        own = tl.load(x + at * x_stride + head * DIM + channel, mask=is_channel, other=0.0).to(tl.float32)
        enter = tl.load(B + at * B_stride + in_group, mask=is_entry, other=0.0).to(tl.float32)
        leave = tl.load(C + at * C_stride + in_group, mask=is_entry, other=0.0).to(tl.float32)
        memory = memory * tl.exp(step * rate) + (own * step)[:, None] * enter[None, :]
        result = tl.sum(memory * leave[None, :], 1) + skip * own
        tl.store(out + (at * HEADS + head) * DIM + channel, result.to(out.dtype.element_ty), mask=is_channel)
    tl.store(state + place, memory.to(state.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["ROWS_KEY"])
def _ssd_chunks(
    x, dt, A, B, C, D, dt_bias, state, out, cu_seqlens, state_slots, x_stride, dt_stride, B_stride, C_stride,
    ROWS_KEY, SOFTPLUS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, DIM: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    channel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    entry, row = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    is_channel, is_entry = channel < DIM, entry < ENTRIES
    row_of_channel = (tl.load(state_slots + sequence).to(tl.int64) * HEADS + head) * DIM + channel
    place = row_of_channel[None, :] * ENTRIES + entry[:, None]
    memory_mask = is_entry[:, None] & is_channel[None, :]
    memory = tl.load(state + place, mask=memory_mask, other=0.0).to(tl.float32)  # transposed: [N, P]
    rate = tl.load(A + head).to(tl.float32)
    bias = None if dt_bias is None else tl.load(dt_bias + head).to(tl.float32)
    skip = 0.0 if D is None else tl.load(D + head).to(tl.float32)
    in_group = head // (HEADS // GROUPS) * ENTRIES + entry
    for first in range(begin, end, CHUNK):
        is_token = row < end - first
        step = tl.load(dt + first * dt_stride + (row * dt_stride + head), mask=is_token, other=0.0)
        step = tl.where(is_token, _clamped(_step_size(step, bias, SOFTPLUS), LEAST, MOST), 0.0)
        total = tl.cumsum(step * rate, 0)
        mask = is_token[:, None] & is_channel[None, :]
        in_row = row[:, None] * x_stride + (head * DIM + channel)[None, :]
        own = tl.load(x + first * x_stride + in_row, mask=mask, other=0.0)
        group_mask = is_token[:, None] & is_entry[None, :]
        in_B, in_C = row[:, None] * B_stride + in_group[None, :], row[:, None] * C_stride + in_group[None, :]
        enter = tl.load(B + first * B_stride + in_B, mask=group_mask, other=0.0)
        leave = tl.load(C + first * C_stride + in_C, mask=group_mask, other=0.0)
        between = tl.where(row[:, None] >= row[None, :], total[:, None] - total[None, :], float("-inf"))
        scores = dot(leave, tl.trans(enter), tl.zeros([CHUNK, CHUNK], tl.float32))
        scores *= tl.exp(between) * step[None, :]
        result = dot_with_parts(leave, memory, tl.zeros([CHUNK, BLOCK_P], tl.float32))
        result = result * tl.exp(total)[:, None] + skip * own.to(tl.float32)
        result = dot_parts_of(scores, own, result)
        in_out = (row * HEADS + head)[:, None] * DIM + channel[None, :]
        tl.store(out + first * (HEADS * DIM) + in_out, result.to(out.dtype.element_ty), mask=mask)
        whole = tl.sum(step * rate, 0)
        left = own.to(tl.float32) * (tl.exp(whole - total) * step)[:, None]
        memory = dot_with_parts(tl.trans(enter), left, memory * tl.exp(whole))
    # Found anew: kept over the loop, this would take registers from it.
    row_of_channel = (tl.load(state_slots + sequence).to(tl.int64) * HEADS + head) * DIM + channel
    place = row_of_channel[None, :] * ENTRIES + entry[:, None]
    tl.store(state + place, memory.to(state.dtype.element_ty), mask=memory_mask)


@triton.jit
def _scan_tokens(
    x, dt, A, B, C, D, z, dt_bias, state, out, cu_seqlens, state_slots, x_stride, dt_stride, B_stride, C_stride,
    z_stride, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    channel = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    entry = tl.arange(0, BLOCK_N)
    is_channel, is_entry = channel < CHANNELS, entry < ENTRIES
    mask = is_channel[:, None] & is_entry[None, :]
    in_state = channel[:, None] * ENTRIES + entry[None, :]
    place = tl.load(state_slots + sequence).to(tl.int64) * (CHANNELS * ENTRIES) + in_state
    memory = tl.load(state + place, mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(A + in_state, mask=mask, other=0.0).to(tl.float32)
    bias = None if dt_bias is None else tl.load(dt_bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + channel, mask=is_channel, other=0.0).to(tl.float32)
    for at in range(begin, end):
        step = _step_size(tl.load(dt + at * dt_stride + channel, mask=is_channel, other=0.0), bias, SOFTPLUS)
        own = tl.load(x + at * x_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
        enter = tl.load(B + at * B_stride + entry, mask=is_entry, other=0.0).to(tl.float32)
        leave = tl.load(C + at * C_stride + entry, mask=is_entry, other=0.0).to(tl.float32)
        memory = memory * tl.exp(step[:, None] * rate) + (own * step)[:, None] * enter[None, :]
        result = tl.sum(memory * leave[None, :], 1)
        if D is not None:
            result += skip * own
        if z is not None:
            gate = tl.load(z + at * z_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
            result *= gate * tl.sigmoid(gate)
        tl.store(out + at * CHANNELS + channel, result.to(out.dtype.element_ty), mask=is_channel)
    tl.store(state + place, memory.to(state.dtype.element_ty), mask=mask)


def _channels(block: int, num_warps: int) -> Any:
    """A configuration: the channels of a program."""
    return triton.Config({"BLOCK_P": block}, num_warps=num_warps, num_stages=2)


_tokens, _scan = Launcher(_ssd_tokens), Launcher(_scan_tokens)
_chunks = Launcher(
    _ssd_chunks,
    [_channels(32, num_warps=8), _channels(16, num_warps=4)],
    key=("HEADS", "GROUPS", "DIM", "ENTRIES", "ROWS_KEY"),
    restored={"state": "state_slots"},
)


def _ssd_supports(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> str | None:
    if B.shape[3] > 256:
        return f"states of {B.shape[3]} entries; there are kernels up to 256"
    return why_not(cu_seqlens, state, (x, B, C), dt, A, D, dt_bias)


@cached_ssd.kernel("triton", _ssd_supports)
def cached_ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`cached_ssd`, rounded once at the end."""
    x, dt, B, C, out = by_token(x), by_token(dt), by_token(B), by_token(C), x.new_empty(x.shape)
    A, D, dt_bias = A.contiguous(), contiguous(D), contiguous(dt_bias)
    _, num_tokens, heads, dim = x.shape
    groups, entries = B.shape[2:]
    given = (x, dt, A, B, C, D, dt_bias, state, out, cu_seqlens, state_slots)
    strides = (x.stride(1), dt.stride(1), B.stride(1), C.stride(1))
    sizes = {"SOFTPLUS": dt_softplus, "LEAST": dt_min, "MOST": dt_max}
    sizes |= {"HEADS": heads, "GROUPS": groups, "DIM": dim, "ENTRIES": entries}
    num_sequences, block_n = state_slots.numel(), max(16, triton.next_power_of_2(entries))
    if goes_one_by_one(num_tokens, state_slots):
        block_p = min(32, max(16, triton.next_power_of_2(dim)))
        grid = (num_sequences, heads, triton.cdiv(dim, block_p))
        _tokens(grid, *given, *strides, **sizes, BLOCK_P=block_p, BLOCK_N=block_n)
    else:
        _chunks(
            lambda values: (num_sequences, heads, triton.cdiv(dim, values["BLOCK_P"])),
            *(*given, *strides, row_key(num_tokens)),
            **sizes,
            BLOCK_N=block_n,
            CHUNK=_CHUNK,
        )
    return out


def _scan_supports(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> str | None:
    if A.shape[1] > 256:
        return f"states of {A.shape[1]} entries; there are kernels up to 256"
    return why_not(cu_seqlens, state, (x,), dt, A, B, C, D, z, dt_bias)


@cached_selective_scan.kernel("triton", _scan_supports)
def cached_selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`cached_selective_scan`, rounded once at the end; one token after the other, as each entry has a decay."""
    x, dt, B, C, out = by_token(x), by_token(dt), by_token(B), by_token(C), x.new_empty(x.shape)
    z = None if z is None else by_token(z)
    A, D, dt_bias = A.contiguous(), contiguous(D), contiguous(dt_bias)
    channels, entries = A.shape
    block_n = triton.next_power_of_2(entries)
    block_i = max(8, 1024 // block_n)
    _scan(
        (state_slots.numel(), triton.cdiv(channels, block_i)),
        *(x, dt, A, B, C, D, z, dt_bias, state, out, cu_seqlens, state_slots),
        *(x.stride(1), dt.stride(1), B.stride(1), C.stride(1), 0 if z is None else z.stride(1)),
        **{"SOFTPLUS": dt_softplus, "CHANNELS": channels, "ENTRIES": entries, "BLOCK_I": block_i, "BLOCK_N": block_n},
    )
    return out
