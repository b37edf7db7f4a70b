"""Matrix memories over slot states in native code: the delta rule, linear attention and the generalised delta rule. A
block of columns of a head's state stays in cache while its new tokens go by.
"""

from torch import Tensor

from autodeploy.kernels.cpu.native import FLOAT, INT, INT64, POINTER, THREADS, NativeFunction, num_threads
from autodeploy.kernels.cpu.sequences import (
    MIN_WORK_FOR_THREADS,
    NUMBERS,
    ROWS,
    SEQUENCES,
    by_token,
    check,
    contiguous,
    numbers,
    rows,
    sequences,
    why_no_numbers,
    why_not,
)
from autodeploy.ops.delta_rule import cached_delta_rule
from autodeploy.ops.generalized_delta_rule import cached_generalized_delta_rule
from autodeploy.ops.linear_attention import cached_linear_attention

_DECAY = (*NUMBERS, INT64, INT64)  # the logarithms, how far tokens lie apart, how many a head has
_delta_rule = NativeFunction(
    "delta_rule",
    (
        *(*SEQUENCES, *ROWS, *ROWS, *ROWS, *NUMBERS, INT64, *_DECAY, FLOAT, FLOAT),
        *(POINTER, POINTER, INT64, INT64, INT64, INT64, THREADS),
    ),
    INT,
)
_linear_attention = NativeFunction(
    "linear_attention",
    (*SEQUENCES, *ROWS, *ROWS, *ROWS, *_DECAY, *NUMBERS, POINTER, POINTER, INT64, INT64, INT64, THREADS),
    INT,
)
_generalized_delta_rule = NativeFunction(
    "generalized_delta_rule",
    (*SEQUENCES, *ROWS, *ROWS, *ROWS, *ROWS, *ROWS, *_DECAY, POINTER, POINTER, INT64, INT64, INT64, THREADS),
    INT,
)


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
    return why_not(cu_seqlens, state_slots, state, query, key, value) or why_no_numbers(beta, decay)


@cached_delta_rule.kernel("cpu", _delta_supports)
def cached_delta_rule_cpu(
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
    query, key, value, out = by_token(query), by_token(key), by_token(value), value.new_empty(value.shape)
    beta, decay = by_token(beta), None if decay is None else by_token(decay)
    decays = key.shape[3] if decay is not None and decay.dim() == 4 else 1
    check(
        _delta_rule[value.dtype](
            *sequences(cu_seqlens, state_slots, value.shape[1], state),
            *(*rows(query), *rows(key), *rows(value), *numbers(beta), beta.stride(1)),
            *(*numbers(decay), 0 if decay is None else decay.stride(1), decays),
            *(scale, -1.0 if norm_eps is None else norm_eps, state.data_ptr(), out.data_ptr()),
            *(key.shape[2], value.shape[2], key.shape[3], value.shape[3]),
            num_threads(value.numel() * key.shape[3], MIN_WORK_FOR_THREADS),
        )
    )
    return out


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
    return why_not(cu_seqlens, state_slots, state, query, key, value) or why_no_numbers(decay, bonus)


@cached_linear_attention.kernel("cpu", _linear_attention_supports)
def cached_linear_attention_cpu(
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
    query, key, value, out = by_token(query), by_token(key), by_token(value), value.new_empty(value.shape)
    decay, bonus = by_token(decay), contiguous(bonus)
    check(
        _linear_attention[value.dtype](
            *sequences(cu_seqlens, state_slots, value.shape[1], state),
            *(*rows(query), *rows(key), *rows(value)),
            *(*numbers(decay), decay.stride(1), decay.shape[3], *numbers(bonus)),
            *(state.data_ptr(), out.data_ptr(), value.shape[2], key.shape[3], value.shape[3]),
            num_threads(value.numel() * key.shape[3], MIN_WORK_FOR_THREADS),
        )
    )
    return out


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
    return why_not(cu_seqlens, state_slots, state, query, key, value, read, write) or why_no_numbers(decay)


@cached_generalized_delta_rule.kernel("cpu", _generalized_supports)
def cached_generalized_delta_rule_cpu(
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
    """`cached_generalized_delta_rule`, rounded once at the end."""
    parts = [by_token(part) for part in (query, key, value, read, write)]
    decay, out = by_token(decay), value.new_empty(value.shape)
    check(
        _generalized_delta_rule[value.dtype](
            *sequences(cu_seqlens, state_slots, value.shape[1], state),
            *(argument for part in parts for argument in rows(part)),
            *(*numbers(decay), decay.stride(1), decay.shape[3], state.data_ptr(), out.data_ptr()),
            *(value.shape[2], key.shape[3], value.shape[3]),
            num_threads(2 * value.numel() * key.shape[3], MIN_WORK_FOR_THREADS),
        )
    )
    return out
