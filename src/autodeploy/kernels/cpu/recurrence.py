"""Recurrences over slot states in native code: every sequence's head or block of channels runs through its new tokens
with its state in cache. For decode steps that is one pass over the state; chunks of a prompt take the same path.
"""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import FLOAT, INT, INT64, POINTER, NativeFunction, num_threads, pointer, why_refused
from autodeploy.ops.causal_conv import cached_causal_conv
from autodeploy.ops.delta_rule import cached_delta_rule
from autodeploy.ops.generalized_delta_rule import cached_generalized_delta_rule
from autodeploy.ops.linear_attention import cached_linear_attention
from autodeploy.ops.linear_recurrence import cached_linear_recurrence
from autodeploy.ops.ssm import cached_selective_scan, cached_ssd
from autodeploy.ops.wkv import cached_wkv

_MIN_WORK_FOR_THREADS = 1 << 15
_ROWS = (POINTER, INT64)
_SEQUENCES = (POINTER, POINTER, INT64, INT64, INT64)
_causal_conv = NativeFunction(
    "causal_conv", (*_SEQUENCES, *_ROWS, POINTER, POINTER, INT, POINTER, POINTER, INT64, INT64, INT), INT
)
_ssd = NativeFunction(
    "ssd",
    (
        *(*_SEQUENCES, *_ROWS, POINTER, POINTER, *_ROWS, *_ROWS, POINTER, POINTER, INT, FLOAT, FLOAT),
        *(POINTER, POINTER, INT64, INT64, INT64, INT64, INT),
    ),
    INT,
)
_selective_scan = NativeFunction(
    "selective_scan",
    (
        *(*_SEQUENCES, *_ROWS, *_ROWS, POINTER, *_ROWS, *_ROWS, POINTER, *_ROWS, POINTER, INT),
        *(POINTER, POINTER, INT64, INT64, INT),
    ),
    INT,
)
_delta_rule = NativeFunction(
    "delta_rule",
    (
        *(*_SEQUENCES, *_ROWS, *_ROWS, *_ROWS, POINTER, POINTER, INT64, FLOAT, FLOAT),
        *(POINTER, POINTER, INT64, INT64, INT64, INT64, INT),
    ),
    INT,
)
_linear_recurrence = NativeFunction(
    "linear_recurrence", (*_SEQUENCES, *_ROWS, *_ROWS, POINTER, POINTER, INT64, INT), INT
)
_wkv = NativeFunction("wkv", (*_SEQUENCES, *_ROWS, *_ROWS, POINTER, POINTER, POINTER, POINTER, INT64, INT), INT)
_linear_attention = NativeFunction(
    "linear_attention",
    (*_SEQUENCES, *_ROWS, *_ROWS, *_ROWS, POINTER, INT64, POINTER, POINTER, POINTER, INT64, INT64, INT64, INT),
    INT,
)
_generalized_delta_rule = NativeFunction(
    "generalized_delta_rule",
    (*_SEQUENCES, *_ROWS, *_ROWS, *_ROWS, *_ROWS, *_ROWS, POINTER, POINTER, POINTER, INT64, INT64, INT64, INT),
    INT,
)

_FAULTS = {
    1: "cu_seqlens do not fit the tokens given",
    2: "state_slots names a slot outside the states",
}
"""By `Status` in csrc/sequences.h."""


def _why_not(cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor, *given: Tensor | None) -> str | None:
    for name, tensor in (("cu_seqlens", cu_seqlens), ("state_slots", state_slots)):
        if tensor is None or tensor.dtype != torch.int32:
            return f"{name} is {'None' if tensor is None else tensor.dtype}, not torch.int32"
    if not state.is_contiguous():
        return "the states are not contiguous"
    return why_refused(*given)


def _sequences(cu_seqlens: Tensor | None, state_slots: Tensor, num_tokens: int, state: Tensor) -> tuple[int, ...]:
    """The first arguments of every function."""
    if cu_seqlens is None or cu_seqlens.numel() != state_slots.numel() + 1:
        raise IndexError(f"recurrence: {_FAULTS[1]}")
    if not (cu_seqlens.is_contiguous() and state_slots.is_contiguous()):
        raise IndexError("recurrence: cu_seqlens and state_slots must be contiguous")
    return cu_seqlens.data_ptr(), state_slots.data_ptr(), state_slots.numel(), num_tokens, state.shape[0]


def _check(status: int) -> None:
    if status:
        raise IndexError(f"recurrence: {_FAULTS[status]}; the batch inputs of a step contradict each other")


def _by_token(x: Tensor) -> Tensor:
    """The tensor itself if what belongs to one token lies together, else a copy."""
    return x if x[0, 0].is_contiguous() else x.contiguous()


def _rows(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.stride(1))


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


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
    return _why_not(cu_seqlens, state_slots, window, x, window)


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
    x, out = _by_token(x), x.new_empty(x.shape)
    taps, offsets = weight.float().t().contiguous(), _floats(bias)
    _check(
        _causal_conv[x.dtype](
            *_sequences(cu_seqlens, state_slots, x.shape[1], window),
            *_rows(x),
            *(taps.data_ptr(), pointer(offsets), activation == "silu"),
            *(window.data_ptr(), out.data_ptr(), x.shape[2], weight.shape[1]),
            num_threads(x.numel() * weight.shape[1], _MIN_WORK_FOR_THREADS),
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
    return _why_not(cu_seqlens, state_slots, state, x, B, C)


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
    x, B, C, out = _by_token(x), _by_token(B), _by_token(C), x.new_empty(x.shape)
    floats = [_floats(value) for value in (dt, A, D, dt_bias)]
    most = float("inf") if dt_max is None else dt_max
    _check(
        _ssd[x.dtype](
            *_sequences(cu_seqlens, state_slots, x.shape[1], state),
            *(*_rows(x), pointer(floats[0]), pointer(floats[1]), *_rows(B), *_rows(C)),
            *(pointer(floats[2]), pointer(floats[3]), dt_softplus, dt_min, most),
            *(state.data_ptr(), out.data_ptr(), x.shape[2], x.shape[3], B.shape[2], B.shape[3]),
            num_threads(x.numel() * B.shape[3], _MIN_WORK_FOR_THREADS),
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
    return _why_not(cu_seqlens, state_slots, state, x, dt, B, C, z)


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
    x, dt, B, C = (_by_token(value) for value in (x, dt, B, C))
    z, out = None if z is None else _by_token(z), x.new_empty(x.shape)
    floats = [_floats(value) for value in (A, D, dt_bias)]
    _check(
        _selective_scan[x.dtype](
            *_sequences(cu_seqlens, state_slots, x.shape[1], state),
            *(*_rows(x), *_rows(dt), pointer(floats[0]), *_rows(B), *_rows(C), pointer(floats[1])),
            *(*_rows(z), pointer(floats[2]), dt_softplus, state.data_ptr(), out.data_ptr(), *A.shape),
            num_threads(x.numel() * A.shape[1], _MIN_WORK_FOR_THREADS),
        )
    )
    return out


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
    return _why_not(cu_seqlens, state_slots, state, query, key, value)


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
    query, key, value, out = _by_token(query), _by_token(key), _by_token(value), value.new_empty(value.shape)
    rate, logarithms = _floats(beta), _floats(decay)
    decays = key.shape[3] if decay is not None and decay.dim() == 4 else 1
    _check(
        _delta_rule[value.dtype](
            *_sequences(cu_seqlens, state_slots, value.shape[1], state),
            *(*_rows(query), *_rows(key), *_rows(value), pointer(rate), pointer(logarithms), decays),
            *(scale, -1.0 if norm_eps is None else norm_eps, state.data_ptr(), out.data_ptr()),
            *(key.shape[2], value.shape[2], key.shape[3], value.shape[3]),
            num_threads(value.numel() * key.shape[3], _MIN_WORK_FOR_THREADS),
        )
    )
    return out


def _linear_recurrence_supports(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> str | None:
    return _why_not(cu_seqlens, state_slots, state, x, gate)


@cached_linear_recurrence.kernel("cpu", _linear_recurrence_supports)
def cached_linear_recurrence_cpu(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> Tensor:
    """`cached_linear_recurrence`, one pass over the row."""
    x, gate, out = _by_token(x), _by_token(gate), x.new_empty(x.shape)
    _check(
        _linear_recurrence[x.dtype](
            *_sequences(cu_seqlens, state_slots, x.shape[1], state),
            *(*_rows(x), *_rows(gate), state.data_ptr(), out.data_ptr(), x.shape[2]),
            num_threads(x.numel(), _MIN_WORK_FOR_THREADS),
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
    return _why_not(cu_seqlens, state_slots, memory, key, value)


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
    key, value, out = _by_token(key), _by_token(value), value.new_empty(value.shape)
    fading, own = decay.float().contiguous(), bonus.float().contiguous()
    _check(
        _wkv[value.dtype](
            *_sequences(cu_seqlens, state_slots, value.shape[1], memory),
            *(*_rows(key), *_rows(value), fading.data_ptr(), own.data_ptr(), memory.data_ptr(), out.data_ptr()),
            value.shape[2],
            num_threads(8 * value.numel(), _MIN_WORK_FOR_THREADS),
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
    return _why_not(cu_seqlens, state_slots, state, query, key, value)


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
    query, key, value, out = _by_token(query), _by_token(key), _by_token(value), value.new_empty(value.shape)
    logarithms, own = decay.float().contiguous(), _floats(bonus)
    _check(
        _linear_attention[value.dtype](
            *_sequences(cu_seqlens, state_slots, value.shape[1], state),
            *(*_rows(query), *_rows(key), *_rows(value), logarithms.data_ptr(), decay.shape[3], pointer(own)),
            *(state.data_ptr(), out.data_ptr(), value.shape[2], key.shape[3], value.shape[3]),
            num_threads(value.numel() * key.shape[3], _MIN_WORK_FOR_THREADS),
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
    return _why_not(cu_seqlens, state_slots, state, query, key, value, read, write)


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
    rows = [_by_token(part) for part in (query, key, value, read, write)]
    logarithms, out = decay.float().contiguous(), value.new_empty(value.shape)
    _check(
        _generalized_delta_rule[value.dtype](
            *_sequences(cu_seqlens, state_slots, value.shape[1], state),
            *(argument for part in rows for argument in _rows(part)),
            *(logarithms.data_ptr(), state.data_ptr(), out.data_ptr()),
            *(value.shape[2], key.shape[3], value.shape[3]),
            num_threads(2 * value.numel() * key.shape[3], _MIN_WORK_FOR_THREADS),
        )
    )
    return out
