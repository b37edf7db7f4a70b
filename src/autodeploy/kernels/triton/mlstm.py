"""cached_mlstm, token by token: a program has some columns of one head's memory, and the normaliser beside them.

All programs of a head read its normaliser and its level, so these are moved on by a launch of their own afterwards.
"""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher
from autodeploy.kernels.triton.sequences import by_token, why_not
from autodeploy.ops.mlstm import cached_mlstm

_MOST_WIDTH = 256
_MOST_COLUMNS = 32


@triton.jit
def _go_through_tokens(
    query, key, value, input_gate, forget_gate, state, out, cu_seqlens, state_slots, query_stride, key_stride,
    value_stride, input_stride, forget_stride, SCALE: tl.constexpr, EPS: tl.constexpr, HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
):  # fmt: skip
    """WITH_COLUMNS: move a block of columns on and give its results; else the normaliser and the level."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    wide = tl.arange(0, BLOCK_H)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_wide, is_column = wide < KEY_DIM, column < VALUE_DIM
    ROW: tl.constexpr = VALUE_DIM + 1
    slot = tl.load(state_slots + sequence).to(tl.int64)
    state += (slot * HEADS + head) * ((KEY_DIM + 1) * ROW)
    level = tl.load(state + KEY_DIM * ROW + VALUE_DIM)
    sums = tl.load(state + wide * ROW + VALUE_DIM, mask=is_wide, other=0.0)
    places, mask = state + wide[:, None] * ROW + column[None, :], is_wide[:, None] & is_column[None, :]
    if WITH_COLUMNS:
        memory = tl.load(places, mask=mask, other=0.0)
    for at in range(begin, end):
        k = tl.load(key + at * key_stride + head * KEY_DIM + wide, mask=is_wide, other=0.0).to(tl.float32)
        gate = tl.load(input_gate + at * input_stride + head).to(tl.float32)
        forget = tl.load(forget_gate + at * forget_stride + head).to(tl.float32)
        before = level + tl.minimum(forget, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(forget)))
        level = tl.maximum(before, gate)
        kept, fresh = tl.exp(before - level), k * tl.exp(gate - level)
        sums = kept * sums + fresh
        if WITH_COLUMNS:
            q = tl.load(query + at * query_stride + head * KEY_DIM + wide, mask=is_wide, other=0.0)
            q = q.to(tl.float32) * SCALE
            v = tl.load(value + at * value_stride + head * VALUE_DIM + column, mask=is_column, other=0.0)
            memory = kept * memory + fresh[:, None] * v.to(tl.float32)[None, :]
            size = tl.maximum(tl.abs(tl.sum(q * sums, 0)), tl.exp(-level)) + EPS
            result = tl.sum(q[:, None] * memory, 0) / size
            place = out + (at * HEADS + head) * VALUE_DIM + column
            tl.store(place, result.to(out.dtype.element_ty), mask=is_column)
    if WITH_COLUMNS:
        tl.store(places, memory, mask=mask)
        tl.store(state + KEY_DIM * ROW + column, tl.zeros([BLOCK_V], tl.float32), mask=is_column)
    else:
        tl.store(state + wide * ROW + VALUE_DIM, sums, mask=is_wide)
        tl.store(state + KEY_DIM * ROW + VALUE_DIM, level)


_tokens = Launcher(_go_through_tokens)


def _supports(
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
) -> str | None:
    if key.shape[3] > _MOST_WIDTH:
        return f"keys {key.shape[3]} wide; there are kernels up to {_MOST_WIDTH}"
    return why_not(cu_seqlens, memory, (query, key, value), input_gate, forget_gate, memory)


@cached_mlstm.kernel("triton", _supports)
def cached_mlstm_triton(
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
    """`cached_mlstm`, rounded once at the end."""
    given = [by_token(x) for x in (query, key, value, input_gate, forget_gate)]
    _, _, heads, value_dim = value.shape
    key_dim, out = key.shape[3], value.new_empty(value.shape)
    blocks = {"BLOCK_H": max(16, triton.next_power_of_2(key_dim))}
    blocks["BLOCK_V"] = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(value_dim)))
    sizes = {"SCALE": scale, "EPS": eps, "HEADS": heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, **blocks}
    arguments = (*given, memory, out, cu_seqlens, state_slots, *(x.stride(1) for x in given))
    grid = (state_slots.numel(), heads)
    _tokens((*grid, triton.cdiv(value_dim, blocks["BLOCK_V"])), *arguments, **sizes, WITH_COLUMNS=True)
    _tokens((*grid, 1), *arguments, **sizes, WITH_COLUMNS=False)
    return out
