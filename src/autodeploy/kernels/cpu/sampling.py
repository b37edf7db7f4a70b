"""choose_tokens: a row per thread, no sort; a row stays in its core's cache."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import INT64, POINTER, THREADS, NativeFunction, num_threads, pointer, why_refused
from autodeploy.ops.sampling import choose_tokens

_MIN_ELEMENTS_FOR_THREADS = 1 << 16

_choose_tokens = NativeFunction("choose_tokens", (*[POINTER] * 9, INT64, INT64, THREADS))


def _supports(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
) -> str | None:
    return why_refused(logits)


@choose_tokens.kernel("cpu", _supports, batch_invariant=True)
def choose_tokens_cpu(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`choose_tokens`, with sums in another order."""
    logits = logits.contiguous()
    num_rows, width = logits.shape
    reals = [_of(column, torch.float32) for column in (temperature, top_p, min_p)]
    numbers = [_of(column, torch.int64) for column in (top_k, keys, positions)]
    tokens, best = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.float32)
    _choose_tokens[logits.dtype](
        logits.data_ptr(),
        pointer(reals[0]),
        pointer(numbers[0]),
        pointer(reals[1]),
        pointer(reals[2]),
        pointer(numbers[1]),
        pointer(numbers[2]),
        tokens.data_ptr(),
        best.data_ptr(),
        num_rows,
        width,
        num_threads(logits.numel() if num_rows > 1 else 0, _MIN_ELEMENTS_FOR_THREADS),
    )
    return tokens, best


def _of(column: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if column is None else column.to(dtype).contiguous()
