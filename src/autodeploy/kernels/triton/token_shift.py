"""cached_token_shift: every token's row is copied from where it is, then what later steps look back on is moved on.

The rows that stand before a sequence's new ones are in its slot, or are all the same where it begins.
"""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher
from autodeploy.kernels.triton.paged import find_tile
from autodeploy.kernels.triton.sequences import by_token, contiguous, why_not
from autodeploy.ops.token_shift import cached_token_shift

_BLOCK = 1024
_MOST_ELEMENTS = 8192
"""Of the rows that one program moves on."""


@triton.jit
def _rows(
    x, first, recent, seq_lens, state_slots, sequence, begin, end, at, column, mask, x_stride,
    DISTANCE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some of a sequence's rows, counted from the oldest that it looks back on."""
    is_new = (at >= DISTANCE)[:, None]
    value = tl.load(x + (begin + at - DISTANCE)[:, None] * x_stride + column[None, :], mask=mask & is_new, other=0.0)
    slot = tl.load(state_slots + sequence).to(tl.int64)
    place = recent + (slot * DISTANCE + at)[:, None] * WIDTH + column[None, :]
    if tl.load(seq_lens + sequence) > end - begin:
        value = tl.where(is_new, value, tl.load(place, mask=mask & ~is_new, other=0.0))
    elif first is not None:
        value = tl.where(is_new, value, tl.load(first + column, mask=column < WIDTH, other=0.0)[None, :])
    return value, place


@triton.jit(do_not_specialize=["num_sequences"])
def _shift(
    x, first, recent, out, cu_seqlens, seq_lens, state_slots, num_sequences, x_stride, DISTANCE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, token, end = find_tile(cu_seqlens, num_sequences, tl.program_id(0), 1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    at = (token - begin) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (column < WIDTH)[None, :]
    value, _ = _rows(
        x, first, recent, seq_lens, state_slots, sequence, begin, end, at, column, mask, x_stride, DISTANCE, WIDTH
    )
    tl.store(out + (begin + at)[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit
def _move_on(
    x, first, recent, cu_seqlens, seq_lens, state_slots, x_stride, DISTANCE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    row = tl.arange(0, BLOCK_D)
    at = end - begin + row
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < DISTANCE)[:, None] & (column < WIDTH)[None, :]
    value, place = _rows(
        x, first, recent, seq_lens, state_slots, sequence, begin, end, at, column, mask, x_stride, DISTANCE, WIDTH
    )
    tl.debug_barrier()  # what other threads read is read before it is overwritten
    tl.store(place - (end - begin) * WIDTH, value, mask=mask)


_shift_tokens, _move_states = Launcher(_shift), Launcher(_move_on)


def _supports(
    x: Tensor,
    distance: int,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    recent: Tensor,
) -> str | None:
    if distance > _MOST_ELEMENTS // 16:
        return f"a distance of {distance}; there are kernels up to {_MOST_ELEMENTS // 16}"
    return why_not(cu_seqlens, recent, (x, recent), first)


@cached_token_shift.kernel("triton", _supports)
def cached_token_shift_triton(
    x: Tensor,
    distance: int,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    recent: Tensor,
) -> Tensor:
    """`cached_token_shift`, bit for bit."""
    x, out = by_token(x), x.new_empty(x.shape)
    start = contiguous(None if first is None else first.to(x.dtype).expand(x.shape[2:]))
    width, num_tokens, num_sequences = x.shape[2:].numel(), x.shape[1], state_slots.numel()
    sizes = {"DISTANCE": distance, "WIDTH": width}
    block = min(_BLOCK, triton.next_power_of_2(width))
    given = (cu_seqlens, seq_lens, state_slots)
    grid = (num_tokens, triton.cdiv(width, block))
    _shift_tokens(grid, x, start, recent, out, *given, num_sequences, x.stride(1), **sizes, BLOCK=block)
    rows = triton.next_power_of_2(distance)
    block = min(block, _MOST_ELEMENTS // rows)
    grid = (num_sequences, triton.cdiv(width, block))
    _move_states(grid, x, start, recent, *given, x.stride(1), **sizes, BLOCK_D=rows, BLOCK=block)
    return out
