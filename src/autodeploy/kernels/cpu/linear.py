"""linear for any number of rows: bound by reading the weight at few, by multiplying at many."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.kernels.cpu.native import (
    INT64,
    MIN_WEIGHTS_FOR_THREADS,
    POINTER,
    THREADS,
    NativeFunction,
    num_threads,
    pointer,
    why_refused,
)
from autodeploy.ops.linear import linear

FEW_ROWS = 64
"""Rows up to which they are multiplied with one pair of weight rows after the other; more go by blocks."""

native_linear = NativeFunction("linear", (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT64, POINTER, THREADS))


@functools.cache
def _has_bfloat16_products() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _is_for_torch(x: Tensor, num_rows: int, num_inputs: int) -> bool:
    """Whether torch's product is as good (oneDNN's with bfloat16), or the only one: our blocks take inputs in pairs."""
    if x.dtype != torch.bfloat16 or num_rows <= FEW_ROWS:
        return False
    return num_inputs % 2 == 1 or _has_bfloat16_products()


def _supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if weight.dim() != 2 or 0 in weight.shape:
        return f"a weight of shape {tuple(weight.shape)}"
    return why_refused(x, weight, bias)


@linear.kernel("cpu", _supports)
def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with float32 sums."""
    num_outputs, num_inputs = weight.shape
    num_rows = x.numel() // num_inputs
    if not weight.is_contiguous() or _is_for_torch(x, num_rows, num_inputs):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], num_outputs)
    elements = x.new_empty(num_rows * num_inputs, dtype=torch.float32) if num_rows > FEW_ROWS else None
    native_linear[x.dtype](
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        num_rows,
        num_inputs,
        num_outputs,
        pointer(elements),
        num_threads(num_outputs * num_inputs, MIN_WEIGHTS_FOR_THREADS),
    )
    return out
