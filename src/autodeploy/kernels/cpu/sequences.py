"""What native recurrences are given: sequences and their slots, rows of tokens, and parameters of either dtype."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import DTYPES, INT, INT64, POINTER, pointer, why_refused

SEQUENCES = (POINTER, POINTER, INT64, INT64, INT64)
"""Types of what `sequences` gives."""
ROWS = (POINTER, INT64)
"""Types of what `rows` gives."""
NUMBERS = (POINTER, INT)
"""Types of what `numbers` gives."""

MIN_WORK_FOR_THREADS = 1 << 15
"""Elements of state from which on a second thread pays."""

_FAULTS = {
    1: "cu_seqlens do not fit the tokens given",
    2: "state_slots names a slot outside the states",
}
"""By `Status` in csrc/sequences.h."""


def why_not(cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor, *given: Tensor | None) -> str | None:
    """The reason that tensors of one dtype cannot be taken with these states, or None."""
    for name, tensor in (("cu_seqlens", cu_seqlens), ("state_slots", state_slots)):
        if tensor is None or tensor.dtype != torch.int32:
            return f"{name} is {'None' if tensor is None else tensor.dtype}, not torch.int32"
    if not state.is_contiguous():
        return "the states are not contiguous"
    return why_refused(*given)


def sequences(cu_seqlens: Tensor | None, state_slots: Tensor, num_tokens: int, state: Tensor) -> tuple[int, ...]:
    """The first arguments of every function."""
    if cu_seqlens is None or cu_seqlens.numel() != state_slots.numel() + 1:
        raise IndexError(f"recurrence: {_FAULTS[1]}")
    if not (cu_seqlens.is_contiguous() and state_slots.is_contiguous()):
        raise IndexError("recurrence: cu_seqlens and state_slots must be contiguous")
    return cu_seqlens.data_ptr(), state_slots.data_ptr(), state_slots.numel(), num_tokens, state.shape[0]


def check(status: int) -> None:
    """Raise what a native recurrence found.

    Raises:
        IndexError: the batch inputs do not fit; nothing was written.
    """
    if status:
        raise IndexError(f"recurrence: {_FAULTS[status]}; the batch inputs of a step contradict each other")


def by_token(x: Tensor) -> Tensor:
    """The tensor itself if what belongs to one token lies together, else a copy."""
    return x if x[0, 0].is_contiguous() else x.contiguous()


def rows(x: Tensor | None) -> tuple[int | None, int]:
    """Where the tokens' elements are, and how far tokens lie apart."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(1))


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, or nothing, without gaps."""
    return None if x is None else x.contiguous()


def numbers(x: Tensor | None) -> tuple[int | None, bool]:
    """Where numbers of either dtype are, and whether they are bfloat16."""
    return pointer(x), x is not None and x.dtype == torch.bfloat16


def why_no_numbers(*given: Tensor | None) -> str | None:
    """The reason that parameters cannot be taken as they are, or None."""
    for tensor in given:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"a parameter of {tensor.dtype}; there are kernels for {', '.join(DTYPES.values())}"
    return None
