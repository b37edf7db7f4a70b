"""quantized_linear for any number of rows: bound by reading the weight at few, by dot products of bytes at many."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import (
    INT,
    INT64,
    MIN_WEIGHTS_FOR_THREADS,
    POINTER,
    THREADS,
    NativeFunction,
    num_threads,
    pointer,
    why_refused,
)
from autodeploy.ops.quantized_linear import BLOCK, QUAD, TILE, quantized_linear

PANEL = 8
"""Rows that lie together, at most, as csrc/quantized.h counts them."""
BLOCK_BYTES = 76
"""A block of activations, at most: 32 numbers of up to 16 bits, a scale and sums."""

_quantized_linear = NativeFunction("quantized_linear", (*[POINTER] * 6, *[INT64] * 4, INT, THREADS, POINTER))


def why_not_packed(weight: Tensor, scales: Tensor, offsets: Tensor | None) -> str | None:
    """The reason that these are no packed weight, or None."""
    if weight.dtype != torch.uint8 or weight.dim() != 5 or weight.shape[2] not in (4, 8):
        return f"a weight {weight.dtype} {tuple(weight.shape)}; it must be packed numbers of 4 or 8 bits"
    if tuple(weight.shape[3:]) != (TILE, QUAD) or 0 in weight.shape:
        return f"a weight of shape {tuple(weight.shape)}"
    if any(part is not None and part.dtype != torch.float16 for part in (scales, offsets)):
        return f"scales {scales.dtype}; they must be float16"
    return None


def _supports(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> str | None:
    return why_not_packed(weight, scales, offsets) or why_refused(x, bias)


@quantized_linear.kernel("cpu", _supports)
def quantized_linear_cpu(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """`quantized_linear` with sums of whole numbers in each block of inputs."""
    num_inputs = x.shape[-1]
    num_rows = x.numel() // num_inputs
    x, weight, scales = x.contiguous(), weight.contiguous(), scales.contiguous()
    offsets, bias = (None if part is None else part.contiguous() for part in (offsets, bias))
    out = x.new_empty(*x.shape[:-1], num_outputs)
    blocks = -(-num_rows // PANEL) * PANEL * -(-num_inputs // BLOCK)
    scratch = x.new_empty(blocks * BLOCK_BYTES, dtype=torch.uint8)
    _quantized_linear[x.dtype](
        x.data_ptr(),
        weight.data_ptr(),
        scales.data_ptr(),
        pointer(offsets),
        pointer(bias),
        out.data_ptr(),
        num_rows,
        num_inputs,
        num_outputs,
        scales.shape[1],
        weight.shape[2],
        num_threads(num_outputs * num_inputs, MIN_WEIGHTS_FOR_THREADS),
        scratch.data_ptr(),
    )
    return out
