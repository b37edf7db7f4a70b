"""cached_token_shift: rows copied from where they are, one call."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import INT, INT64, POINTER, THREADS, NativeFunction, num_threads, pointer
from autodeploy.kernels.cpu.sequences import ROWS, SEQUENCES, by_token, check, rows, sequences, why_not
from autodeploy.ops.token_shift import cached_token_shift

_MIN_ELEMENTS_FOR_THREADS = 1 << 16

_token_shift = NativeFunction(
    "token_shift", (*SEQUENCES, POINTER, *ROWS, INT64, POINTER, POINTER, POINTER, INT64, THREADS), INT
)


def _supports(
    x: Tensor,
    distance: int,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    recent: Tensor,
) -> str | None:
    if seq_lens.dtype != torch.int32:
        return f"seq_lens is {seq_lens.dtype}, not torch.int32"
    return why_not(cu_seqlens, state_slots, recent, x, recent)


@cached_token_shift.kernel("cpu", _supports)
def cached_token_shift_cpu(
    x: Tensor,
    distance: int,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    recent: Tensor,
) -> Tensor:
    """`cached_token_shift`, bit for bit.

    Raises:
        IndexError: the batch inputs do not fit; nothing was written.
    """
    x, out = by_token(x), x.new_empty(x.shape)
    start = None if first is None else first.to(x.dtype).expand(x.shape[2:]).contiguous()
    given = sequences(cu_seqlens, state_slots, x.shape[1], recent)
    if seq_lens.numel() != state_slots.numel():
        raise IndexError(f"token_shift: {seq_lens.numel()} seq_lens for {state_slots.numel()} sequences")
    seq_lens = seq_lens.contiguous()
    status = _token_shift[x.dtype](
        *(*given, seq_lens.data_ptr(), *rows(x), distance, pointer(start), recent.data_ptr(), out.data_ptr()),
        *(x.shape[2:].numel(), num_threads(x.numel(), _MIN_ELEMENTS_FOR_THREADS)),
    )
    check(status)
    return out
