"""Matrix memories over slot states: the delta rule, linear attention and the generalised delta rule, token by token;
the first two also chunk by chunk where a head has one decay.

A program has some columns of one head's memory and goes through all new tokens of one sequence with it in registers.
Sources: the delta rule in chunks (arXiv 2406.06484, section 3; with a decay arXiv 2412.06464), linear attention in
chunks (arXiv 2312.06635); the rules themselves as in the ops.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.launch import Launcher, row_key
from autodeploy.kernels.triton.paged import find_tile, most_tiles
from autodeploy.kernels.triton.sequences import (
    by_token,
    contiguous,
    dot_parts_of,
    dot_with_parts,
    goes_one_by_one,
    why_not,
)
from autodeploy.ops.delta_rule import cached_delta_rule
from autodeploy.ops.generalized_delta_rule import cached_generalized_delta_rule
from autodeploy.ops.linear_attention import cached_linear_attention

_LEVELS = 6
"""Chunks have 2 to this power tokens."""
INVERSE_PRECISION = tl.constexpr("tf32x3")
"""Near that of float32: what an inverse of blocks has lost, the blocks around it multiply."""
_MOST_WIDTH = 256
_MOST_WIDTH_OF_CHUNKS = 128


@triton.jit
def _inverse_length(x, EPS: tl.constexpr):
    """What makes vectors along the last axis one long, or 1 where EPS is None."""
    if EPS is None:
        return tl.full(x.shape[:-1], 1.0, tl.float32)
    else:
        wide = x.to(tl.float32)
        return tl.rsqrt(tl.sum(wide * wide, -1) + EPS)


@triton.jit
def _memory_places(
    state, slot, HEADS: tl.constexpr, head, wide, column, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr
):
    """Where a block of columns of a head's memory is, and which of it exists."""
    place = ((tl.load(slot).to(tl.int64) * HEADS + head) * KEY_DIM + wide)[:, None] * VALUE_DIM + column[None, :]
    return state + place, (wide < KEY_DIM)[:, None] & (column < VALUE_DIM)[None, :]


@triton.jit
def _go_through_tokens(
    query, key, value, beta, decay, bonus, read, write, state, out, cu_seqlens, state_slots, query_stride, key_stride,
    value_stride, beta_stride, decay_stride, read_stride, write_stride, SCALE: tl.constexpr, EPS: tl.constexpr,
    DECAYS: tl.constexpr, KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    wide = tl.arange(0, BLOCK_H)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_wide, is_column = wide < KEY_DIM, column < VALUE_DIM
    places, mask = _memory_places(state, state_slots + sequence, HEADS, head, wide, column, KEY_DIM, VALUE_DIM)
    memory = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    in_row = head // (HEADS // KEY_HEADS) * KEY_DIM + wide
    for at in range(begin, end):
        q = tl.load(query + at * query_stride + in_row, mask=is_wide, other=0.0).to(tl.float32)
        k = tl.load(key + at * key_stride + in_row, mask=is_wide, other=0.0).to(tl.float32)
        v = tl.load(value + at * value_stride + head * VALUE_DIM + column, mask=is_column, other=0.0).to(tl.float32)
        q *= _inverse_length(q, EPS) * SCALE
        k *= _inverse_length(k, EPS)
        if bonus is not None:
            own = q * k * tl.load(bonus + head * KEY_DIM + wide, mask=is_wide, other=0.0).to(tl.float32)
            result = tl.sum(q[:, None] * memory, 0) + tl.sum(own, 0) * v
        if read is not None:
            r = tl.load(read + at * read_stride + in_row, mask=is_wide, other=0.0).to(tl.float32)
            w = tl.load(write + at * write_stride + in_row, mask=is_wide, other=0.0).to(tl.float32)
            found = tl.sum(r[:, None] * memory, 0)
        if DECAYS == 1:
            memory *= tl.exp(tl.load(decay + at * decay_stride + head).to(tl.float32))
        elif DECAYS > 1:
            faded = tl.load(decay + at * decay_stride + head * KEY_DIM + wide, mask=is_wide, other=0.0)
            memory *= tl.exp(faded.to(tl.float32))[:, None]
        if read is not None:
            memory += w[:, None] * found[None, :]
        if beta is not None:
            v = tl.load(beta + at * beta_stride + head).to(tl.float32) * (v - tl.sum(k[:, None] * memory, 0))
        memory += k[:, None] * v[None, :]
        if bonus is None:
            result = tl.sum(q[:, None] * memory, 0)
        out_place = (at * HEADS + head) * VALUE_DIM + column
        tl.store(out + out_place, result.to(out.dtype.element_ty), mask=is_column)
    tl.store(places, memory.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _invert(system, row, LEVELS: tl.constexpr):
    """(1 + system)^-1 of a strictly lower triangular system, by inverses of blocks of 1, 2, 4, ... rows."""
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in range(LEVELS):
        is_whole = (row >> level + 1)[:, None] == (row >> level + 1)[None, :]
        is_below = is_whole & ((row >> level)[:, None] != (row >> level)[None, :])
        below = tl.dot(tl.where(is_below, system, 0.0), inverse, input_precision=INVERSE_PRECISION)
        inverse -= tl.dot(inverse, below, input_precision=INVERSE_PRECISION)
    return inverse


@triton.jit
def _decays(decay, first, row, head, is_token, decay_stride):
    """Logarithms of what each token of a chunk leaves of the memory before it, `[L]`."""
    if decay is None:
        return row.to(tl.float32) * 0
    else:
        place = decay + first * decay_stride + (row * decay_stride + head)
        return tl.load(place, mask=is_token, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_sequences", "ROWS_KEY"])
def _solve_chunks(
    key, beta, decay, inverses, cu_seqlens, num_sequences, key_stride, beta_stride, decay_stride, ROWS_KEY,
    EPS: tl.constexpr, KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """How the tokens of a chunk correct each other: the inverse of 1 + beta_i (k_i · k_j) faded from j to i, j < i."""
    CHUNK: tl.constexpr = 1 << LEVELS
    tile, head = tl.program_id(0), tl.program_id(1)
    _, first, end = find_tile(cu_seqlens, num_sequences, tile, CHUNK)
    if first >= end:
        return
    row, wide = tl.arange(0, CHUNK), tl.arange(0, BLOCK_H)
    is_token = row < end - first
    first = first.to(tl.int64)
    in_row = head // (HEADS // KEY_HEADS) * KEY_DIM + wide
    mask = is_token[:, None] & (wide < KEY_DIM)[None, :]
    k = tl.load(key + first * key_stride + (row[:, None] * key_stride + in_row[None, :]), mask=mask, other=0.0)
    by_length = _inverse_length(k, EPS)
    total = tl.cumsum(_decays(decay, first, row, head, is_token, decay_stride), 0)
    share = tl.load(beta + first * beta_stride + (row * beta_stride + head), mask=is_token, other=0.0).to(tl.float32)
    between = tl.where(row[:, None] > row[None, :], total[:, None] - total[None, :], float("-inf"))
    scores = dot(k, tl.trans(k), tl.zeros([CHUNK, CHUNK], tl.float32)) * tl.exp(between)
    inverse = _invert(scores * (by_length * share)[:, None] * by_length[None, :], row, LEVELS)
    place = (tile.to(tl.int64) * HEADS + head) * (CHUNK * CHUNK) + row[:, None] * CHUNK + row[None, :]
    tl.store(inverses + place, inverse.to(inverses.dtype.element_ty))


@triton.jit(do_not_specialize=["ROWS_KEY"])
def _go_through_chunks(
    query, key, value, beta, decay, inverses, state, out, cu_seqlens, state_slots, query_stride, key_stride,
    value_stride, beta_stride, decay_stride, ROWS_KEY, SCALE: tl.constexpr, EPS: tl.constexpr,
    KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, LEVELS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    CHUNK: tl.constexpr = 1 << LEVELS
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin >= end:
        return
    row, wide = tl.arange(0, CHUNK), tl.arange(0, BLOCK_H)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    places, memory_mask = _memory_places(state, state_slots + sequence, HEADS, head, wide, column, KEY_DIM, VALUE_DIM)
    memory = tl.load(places, mask=memory_mask, other=0.0).to(tl.float32)
    in_row = head // (HEADS // KEY_HEADS) * KEY_DIM + wide
    tile = begin // CHUNK + sequence
    for first in range(begin, end, CHUNK):
        is_token = row < end - first
        mask = is_token[:, None] & (wide < KEY_DIM)[None, :]
        q = tl.load(
            query + first * query_stride + (row[:, None] * query_stride + in_row[None, :]), mask=mask, other=0.0
        )
        k = tl.load(key + first * key_stride + (row[:, None] * key_stride + in_row[None, :]), mask=mask, other=0.0)
        value_mask = is_token[:, None] & (column < VALUE_DIM)[None, :]
        in_values = row[:, None] * value_stride + (head * VALUE_DIM + column)[None, :]
        v = tl.load(value + first * value_stride + in_values, mask=value_mask, other=0.0)
        scale_q, scale_k = _inverse_length(q, EPS) * SCALE, _inverse_length(k, EPS)
        left = _decays(decay, first, row, head, is_token, decay_stride)
        total, whole = tl.cumsum(left, 0), tl.sum(left, 0)
        if beta is not None:
            share = tl.load(beta + first * beta_stride + (row * beta_stride + head), mask=is_token, other=0.0).to(
                tl.float32
            )
            found = (
                dot_with_parts(k, memory, tl.zeros([CHUNK, BLOCK_V], tl.float32)) * (scale_k * tl.exp(total))[:, None]
            )
            system = inverses + (tile * HEADS + head) * (CHUNK * CHUNK)
            v = (share[:, None] * (v.to(tl.float32) - found)).to(k.dtype)
            v = dot(tl.load(system + (row[:, None] * CHUNK + row[None, :])), v, tl.zeros([CHUNK, BLOCK_V], tl.float32))
        between = tl.where(row[:, None] >= row[None, :], total[:, None] - total[None, :], float("-inf"))
        scores = dot(q, tl.trans(k), tl.zeros([CHUNK, CHUNK], tl.float32)) * tl.exp(between)
        scores *= scale_q[:, None] * scale_k[None, :]
        result = dot_with_parts(q, memory, tl.zeros([CHUNK, BLOCK_V], tl.float32)) * (scale_q * tl.exp(total))[:, None]
        result = dot_parts_of(scores, v.to(k.dtype), result)
        in_out = (row * HEADS + head)[:, None] * VALUE_DIM + column[None, :]
        tl.store(out + first * (HEADS * VALUE_DIM) + in_out, result.to(out.dtype.element_ty), mask=value_mask)
        kept = v.to(tl.float32) * (scale_k * tl.exp(whole - total))[:, None]
        memory = dot_with_parts(tl.trans(k), kept, memory * tl.exp(whole))
        tile += 1
    # Found anew: kept over the loop, these would take registers from it.
    places, memory_mask = _memory_places(state, state_slots + sequence, HEADS, head, wide, column, KEY_DIM, VALUE_DIM)
    tl.store(places, memory.to(state.dtype.element_ty), mask=memory_mask)


def _columns(block: int, num_warps: int) -> Any:
    """A configuration: the columns of a program."""
    return triton.Config({"BLOCK_V": block}, num_warps=num_warps, num_stages=2)


_tokens = Launcher(_go_through_tokens)
_chunks = Launcher(
    _go_through_chunks,
    [_columns(32, num_warps=8), _columns(16, num_warps=4)],
    key=("KEY_HEADS", "HEADS", "KEY_DIM", "VALUE_DIM", "ROWS_KEY"),
    restored={"state": "state_slots"},
)
_systems = Launcher(
    _solve_chunks,
    [triton.Config({}, num_warps=8), triton.Config({}, num_warps=4)],
    key=("KEY_HEADS", "HEADS", "KEY_DIM", "ROWS_KEY"),
)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    sequences: tuple[Tensor | None, Tensor],
    state: Tensor,
    *,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    read: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
    norm_eps: float | None = None,
) -> Tensor:
    """Any of the three rules; the result, and the memories moved on."""
    query, key, value, out = by_token(query), by_token(key), by_token(value), value.new_empty(value.shape)
    beta, decay, read, write = (None if x is None else by_token(x) for x in (beta, decay, read, write))
    strides = [0 if x is None else x.stride(1) for x in (query, key, value, beta, decay, read, write)]
    _, num_tokens, heads, value_dim = value.shape
    key_heads, key_dim = key.shape[2:]
    cu_seqlens, state_slots = sequences
    num_sequences = state_slots.numel()
    decays = 0 if decay is None else key_dim if decay.dim() == 4 and decay.shape[3] > 1 else 1
    sizes: dict[str, Any] = {"EPS": norm_eps, "KEY_HEADS": key_heads, "HEADS": heads, "KEY_DIM": key_dim}
    sizes["BLOCK_H"] = max(16, triton.next_power_of_2(key_dim))
    columns = {"SCALE": scale, "VALUE_DIM": value_dim}
    memory = (state, out, cu_seqlens, state_slots)
    needs_tokens = decays > 1 or bonus is not None or read is not None or key_dim > _MOST_WIDTH_OF_CHUNKS
    if needs_tokens or goes_one_by_one(num_tokens, state_slots):
        given = (query, key, value, beta, decay, bonus, read, write)
        block_v = min(32, max(16, triton.next_power_of_2(value_dim)))
        grid = (num_sequences, heads, triton.cdiv(value_dim, block_v))
        _tokens(grid, *given, *memory, *strides, DECAYS=decays, **sizes, **columns, BLOCK_V=block_v)
        return out
    sizes |= {"LEVELS": _LEVELS, "ROWS_KEY": row_key(num_tokens)}
    inverses = None
    if beta is not None:
        tiles = most_tiles(num_tokens, num_sequences, 1 << _LEVELS)
        inverses = key.new_empty(tiles, heads, 1 << _LEVELS, 1 << _LEVELS)
        _, key_stride, _, beta_stride, decay_stride, *_ = strides
        given_strides = (key_stride, beta_stride, decay_stride)
        _systems((tiles, heads), key, beta, decay, inverses, cu_seqlens, num_sequences, *given_strides, **sizes)
    _chunks(
        lambda values: (num_sequences, heads, triton.cdiv(value_dim, values["BLOCK_V"])),
        *(query, key, value, beta, decay, inverses, *memory, *strides[:5]),
        **sizes,
        **columns,
    )
    return out


def _why_too_wide(key: Tensor) -> str | None:
    return f"keys {key.shape[3]} wide; there are kernels up to {_MOST_WIDTH}" if key.shape[3] > _MOST_WIDTH else None


def _delta_supports(
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
) -> str | None:
    if norm_eps is not None and norm_eps <= 0:
        return f"norm_eps {norm_eps}; the kernels divide by the length of what fills a chunk up, which is zero"
    return _why_too_wide(key) or why_not(cu_seqlens, state, (query, key, value), beta, decay)


@cached_delta_rule.kernel("triton", _delta_supports)
def cached_delta_rule_triton(
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
    """`cached_delta_rule`, rounded once at the end."""
    sequences = (cu_seqlens, state_slots)
    return _run(query, key, value, decay, sequences, state, beta=beta, scale=scale, norm_eps=norm_eps)


def _linear_attention_supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> str | None:
    return _why_too_wide(key) or why_not(cu_seqlens, state, (query, key, value), decay, bonus)


@cached_linear_attention.kernel("triton", _linear_attention_supports)
def cached_linear_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`cached_linear_attention`, rounded once at the end."""
    return _run(query, key, value, decay, (cu_seqlens, state_slots), state, bonus=contiguous(bonus))


def _generalized_supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> str | None:
    return _why_too_wide(key) or why_not(cu_seqlens, state, (query, key, value, read, write), decay)


@cached_generalized_delta_rule.kernel("triton", _generalized_supports)
def cached_generalized_delta_rule_triton(
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
    """`cached_generalized_delta_rule`, token by token and rounded once at the end."""
    return _run(query, key, value, decay, (cu_seqlens, state_slots), state, read=read, write=write)
