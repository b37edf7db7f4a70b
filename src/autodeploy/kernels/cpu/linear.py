"""linear for few rows: the time is that of reading the weight, once, for all rows; more rows go to torch's product."""

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

MAX_ROWS = 8
"""Rows up to which reading the weight takes longer than multiplying; beyond, a blocked product is faster."""

_linear = NativeFunction("linear", (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT64, THREADS))


def _supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if weight.dim() != 2 or 0 in weight.shape:
        return f"a weight of shape {tuple(weight.shape)}"
    return why_refused(x, weight, bias)


@linear.kernel("cpu", _supports)
def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with the weight read once for up to `MAX_ROWS` rows."""
    num_outputs, num_inputs = weight.shape
    num_rows = x.numel() // num_inputs
    if num_rows > MAX_ROWS or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], num_outputs)
    _linear[x.dtype](
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        num_rows,
        num_inputs,
        num_outputs,
        num_threads(num_outputs * num_inputs, MIN_WEIGHTS_FOR_THREADS),
    )
    return out
