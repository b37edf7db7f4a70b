"""Recurrences of channels over slot states in native code: a block of channels of every sequence runs through its new
tokens with its state in cache. For decode steps that is one pass over the state; chunks of a prompt take the same path.
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
from autodeploy.ops.causal_conv import cached_causal_conv
from autodeploy.ops.linear_recurrence import cached_linear_recurrence
from autodeploy.ops.ssm import cached_selective_scan, cached_ssd
from autodeploy.ops.wkv import cached_wkv

_causal_conv = NativeFunction(
    "causal_conv", (*SEQUENCES, *ROWS, *NUMBERS, *NUMBERS, INT, POINTER, POINTER, INT64, INT64, THREADS), INT
)
_ssd = NativeFunction(
    "ssd",
    (
        *(*SEQUENCES, *ROWS, *NUMBERS, INT64, *NUMBERS, *ROWS, *ROWS, *NUMBERS, *NUMBERS, INT, FLOAT, FLOAT),
        *(POINTER, POINTER, INT64, INT64, INT64, INT64, THREADS),
    ),
    INT,
)
_selective_scan = NativeFunction(
    "selective_scan",
    (
        *(*SEQUENCES, *ROWS, *ROWS, *NUMBERS, *ROWS, *ROWS, *NUMBERS, *ROWS, *NUMBERS, INT),
        *(POINTER, POINTER, INT64, INT64, THREADS),
    ),
    INT,
)
_linear_recurrence = NativeFunction(
    "linear_recurrence", (*SEQUENCES, *ROWS, *ROWS, POINTER, POINTER, INT64, THREADS), INT
)
_wkv = NativeFunction("wkv", (*SEQUENCES, *ROWS, *ROWS, *NUMBERS, *NUMBERS, POINTER, POINTER, INT64, THREADS), INT)


def _conv_supports(
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
    return why_not(cu_seqlens, state_slots, window, x, window) or why_no_numbers(weight, bias)


@cached_causal_conv.kernel("cpu", _conv_supports)
def cached_causal_conv_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    window: Tensor,
) -> Tensor:
    """`cached_causal_conv`, rounded once at the end."""
    x, out = by_token(x), x.new_empty(x.shape)
    weight, bias = weight.contiguous(), contiguous(bias)
    check(
        _causal_conv[x.dtype](
            *sequences(cu_seqlens, state_slots, x.shape[1], window),
            *rows(x),
            *(*numbers(weight), *numbers(bias), activation == "silu"),
            *(window.data_ptr(), out.data_ptr(), x.shape[2], weight.shape[1]),
            num_threads(x.numel() * weight.shape[1], MIN_WORK_FOR_THREADS),
        )
    )
    return out


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
    return why_not(cu_seqlens, state_slots, state, x, B, C) or why_no_numbers(dt, A, D, dt_bias)


@cached_ssd.kernel("cpu", _ssd_supports)
def cached_ssd_cpu(
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
    x, B, C, out = by_token(x), by_token(B), by_token(C), x.new_empty(x.shape)
    dt, A, D, dt_bias = by_token(dt), A.contiguous(), contiguous(D), contiguous(dt_bias)
    most = float("inf") if dt_max is None else dt_max
    check(
        _ssd[x.dtype](
            *sequences(cu_seqlens, state_slots, x.shape[1], state),
            *(*rows(x), *numbers(dt), dt.stride(1), *numbers(A), *rows(B), *rows(C)),
            *(*numbers(D), *numbers(dt_bias), dt_softplus, dt_min, most),
            *(state.data_ptr(), out.data_ptr(), x.shape[2], x.shape[3], B.shape[2], B.shape[3]),
            num_threads(x.numel() * B.shape[3], MIN_WORK_FOR_THREADS),
        )
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
    return why_not(cu_seqlens, state_slots, state, x, dt, B, C, z) or why_no_numbers(A, D, dt_bias)


@cached_selective_scan.kernel("cpu", _scan_supports)
def cached_selective_scan_cpu(
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
    """`cached_selective_scan`, rounded once at the end."""
    x, dt, B, C = (by_token(value) for value in (x, dt, B, C))
    z, out = None if z is None else by_token(z), x.new_empty(x.shape)
    A, D, dt_bias = A.contiguous(), contiguous(D), contiguous(dt_bias)
    check(
        _selective_scan[x.dtype](
            *sequences(cu_seqlens, state_slots, x.shape[1], state),
            *(*rows(x), *rows(dt), *numbers(A), *rows(B), *rows(C), *numbers(D)),
            *(*rows(z), *numbers(dt_bias), dt_softplus, state.data_ptr(), out.data_ptr(), *A.shape),
            num_threads(x.numel() * A.shape[1], MIN_WORK_FOR_THREADS),
        )
    )
    return out


def _linear_recurrence_supports(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> str | None:
    return why_not(cu_seqlens, state_slots, state, x, gate)


@cached_linear_recurrence.kernel("cpu", _linear_recurrence_supports)
def cached_linear_recurrence_cpu(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> Tensor:
    """`cached_linear_recurrence`, one pass over the row."""
    x, gate, out = by_token(x), by_token(gate), x.new_empty(x.shape)
    check(
        _linear_recurrence[x.dtype](
            *sequences(cu_seqlens, state_slots, x.shape[1], state),
            *(*rows(x), *rows(gate), state.data_ptr(), out.data_ptr(), x.shape[2]),
            num_threads(x.numel(), MIN_WORK_FOR_THREADS),
        )
    )
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
    return why_not(cu_seqlens, state_slots, memory, key, value) or why_no_numbers(decay, bonus)


@cached_wkv.kernel("cpu", _wkv_supports)
def cached_wkv_cpu(
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
    decay, bonus = decay.contiguous(), bonus.contiguous()
    check(
        _wkv[value.dtype](
            *sequences(cu_seqlens, state_slots, value.shape[1], memory),
            *(*rows(key), *rows(value), *numbers(decay), *numbers(bonus), memory.data_ptr(), out.data_ptr()),
            value.shape[2],
            num_threads(8 * value.numel(), MIN_WORK_FOR_THREADS),
        )
    )
    return out
