"""nvfp4_linear on any device: 4-bit numbers become a tile of the activations' dtype in registers, exactly."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.float4 import float4_tile, why_not_float4
from autodeploy.kernels.triton.launch import Launcher, row_key, tile_sizes, why_refused
from autodeploy.ops.nvfp4_linear import nvfp4_linear


@triton.jit(do_not_specialize=["num_rows", "ROWS_KEY"])
def _products(
    x,
    weight,
    scales,
    tensor_scale,
    bias,
    out,
    num_rows,
    num_inputs,
    num_outputs,
    ROWS_KEY,
    EVEN_TO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    EVEN: tl.constexpr = EVEN_TO % INPUTS == 0
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own_columns = tl.minimum(columns, num_outputs - 1)
    places = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * num_inputs
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)[None, :]
        value = tl.load(places + inputs) if EVEN else tl.load(places + inputs, mask=inputs < num_inputs, other=0.0)
        tile = float4_tile(weight, scales, own_columns, start, num_inputs, INPUTS, EVEN)
        sums = dot(value, tl.trans(tile.to(value.dtype)), sums)
    sums *= tl.load(tensor_scale).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + own_columns).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (columns < num_outputs)[None, :])


_multiply = Launcher(
    _products,
    [
        tile_sizes(16, 32, 128, 4, 4),
        tile_sizes(16, 16, 256, 4, 4),
        tile_sizes(16, 64, 128, 4, 3),
        tile_sizes(64, 64, 64, 4, 3),
        tile_sizes(128, 64, 64, 8, 3),
    ],
    key=("num_inputs", "num_outputs", "ROWS_KEY"),
)


def _supports(x: Tensor, weight: Tensor, scales: Tensor, tensor_scale: Tensor, bias: Tensor | None) -> str | None:
    return why_not_float4(weight, scales, x.shape[-1]) or why_refused(x, bias)


@nvfp4_linear.kernel("triton", _supports)
def nvfp4_linear_triton(x: Tensor, weight: Tensor, scales: Tensor, tensor_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`nvfp4_linear` with the weight in the activations' dtype, a tile at a time."""
    num_outputs, num_inputs = weight.shape[0], x.shape[-1]
    num_rows = x.numel() // num_inputs
    out = x.new_empty(*x.shape[:-1], num_outputs)
    _multiply(
        lambda values: (triton.cdiv(num_rows, values["ROWS"]), triton.cdiv(num_outputs, values["COLUMNS"])),
        *(x.contiguous(), weight.contiguous(), scales.contiguous().view(torch.uint8), tensor_scale, bias, out),
        *(num_rows, num_inputs, num_outputs),
        ROWS_KEY=row_key(num_rows),
        EVEN_TO=num_inputs & -num_inputs,
    )
    return out
