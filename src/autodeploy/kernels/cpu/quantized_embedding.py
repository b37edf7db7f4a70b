"""quantized_embedding: only the rows that are asked for are read."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import (
    INT,
    INT64,
    POINTER,
    THREADS,
    NativeFunction,
    num_threads,
    pointer,
    why_unavailable,
)
from autodeploy.kernels.cpu.quantized_linear import why_not_packed
from autodeploy.ops.quantized_embedding import quantized_embedding

_MIN_ELEMENTS_FOR_THREADS = 1 << 13
_DTYPES = (torch.float32, torch.bfloat16)

_quantized_embedding = NativeFunction("quantized_embedding", (*[POINTER] * 5, *[INT64] * 4, INT, THREADS), INT)


def _supports(
    indices: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, num_inputs: int, dtype: torch.dtype
) -> str | None:
    if dtype not in _DTYPES:
        return f"dtype {dtype}; there are kernels for float32, bfloat16"
    if indices.dtype != torch.int64 or indices.device.type != "cpu":
        return f"indices {indices.dtype} on {indices.device}"
    return why_not_packed(weight, scales, offsets) or why_unavailable()


@quantized_embedding.kernel("cpu", _supports, batch_invariant=True)
def quantized_embedding_cpu(
    indices: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, num_inputs: int, dtype: torch.dtype
) -> Tensor:
    """`quantized_embedding`. Raises IndexError for an index beyond the table."""
    indices, weight, scales = indices.contiguous(), weight.contiguous(), scales.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    out = torch.empty(*indices.shape, num_inputs, dtype=dtype)
    status = _quantized_embedding[dtype](
        indices.data_ptr(),
        weight.data_ptr(),
        scales.data_ptr(),
        pointer(offsets),
        out.data_ptr(),
        indices.numel(),
        weight.shape[0],
        num_inputs,
        scales.shape[1],
        weight.shape[2],
        num_threads(out.numel(), _MIN_ELEMENTS_FOR_THREADS),
    )
    if status:
        raise IndexError(f"an index is not in the table, which has {weight.shape[0] * scales.shape[2]} rows")
    return out
