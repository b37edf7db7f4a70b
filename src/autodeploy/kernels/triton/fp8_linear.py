"""fp8_linear: activations are rounded by a launch of their own, then multiplied with the weight on tensor cores.

Where a weight has a scale per row and whole sizes, torch's library multiplies; blocks are scaled by a kernel here.
"""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.float8 import add_block, round_to_float8, why_not_float8
from autodeploy.kernels.triton.launch import Launcher, row_key, tile_sizes, why_refused
from autodeploy.kernels.triton.scaled_mm import is_for_library, multiply_by_library
from autodeploy.ops.fp8_linear import fp8_linear


@triton.jit(do_not_specialize=["num_rows", "ROWS_KEY"])
def _products(
    x,
    x_scales,
    weight,
    scales,
    bias,
    out,
    num_rows,
    num_inputs,
    num_outputs,
    num_groups,
    ROWS_KEY,
    BY_BLOCK: tl.constexpr,
    EVEN_TO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    EVEN: tl.constexpr = EVEN_TO % INPUTS == 0
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    own_columns = tl.minimum(columns, num_outputs - 1)
    places = x + own_rows[:, None] * num_inputs
    numbers = weight + own_columns.to(tl.int64)[None, :] * num_inputs
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        if EVEN:
            value, number = tl.load(places + inputs[None, :]), tl.load(numbers + inputs[:, None])
        else:
            inside = inputs < num_inputs
            value = tl.load(places + inputs[None, :], mask=inside[None, :], other=0.0)
            number = tl.load(numbers + inputs[:, None], mask=inside[:, None], other=0.0)
        sums = add_block(sums, value, number, x_scales, scales, own_rows, own_columns, start, num_groups, BY_BLOCK)
    if not BY_BLOCK:
        sums *= tl.load(x_scales + own_rows)[:, None] * tl.load(scales + own_columns).to(tl.float32)[None, :]
    if bias is not None:
        sums += tl.load(bias + own_columns).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (columns < num_outputs)[None, :])


_multiply = Launcher(
    _products,
    [
        tile_sizes(16, 64, 128, 4, 4),
        tile_sizes(16, 32, 128, 4, 5),
        tile_sizes(16, 128, 128, 4, 4),
        tile_sizes(64, 64, 128, 4, 4),
        tile_sizes(64, 128, 128, 4, 4),
        tile_sizes(128, 128, 128, 8, 3),
    ],
    key=("num_inputs", "num_outputs", "BY_BLOCK", "ROWS_KEY"),
)


def _supports(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, block_size: int | None) -> str | None:
    return why_not_float8(weight, scales, block_size) or why_refused(x, bias)


@fp8_linear.kernel("triton", _supports)
def fp8_linear_triton(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, block_size: int | None) -> Tensor:
    """`fp8_linear` with sums of products of float8 numbers."""
    num_outputs, num_inputs = weight.shape
    num_rows = x.numel() // num_inputs
    weight = weight.contiguous()
    rows, x_scales = round_to_float8(x.reshape(num_rows, num_inputs).contiguous(), block_size)
    if is_for_library(weight, block_size):
        product = multiply_by_library(rows, x_scales, weight, scales, bias, x.dtype)
        return product.view(*x.shape[:-1], num_outputs)
    out = x.new_empty(*x.shape[:-1], num_outputs)
    _multiply(
        lambda values: (triton.cdiv(num_rows, values["ROWS"]), triton.cdiv(num_outputs, values["COLUMNS"])),
        *(rows, x_scales, weight, scales.contiguous(), bias, out),
        *(num_rows, num_inputs, num_outputs, x_scales.shape[1]),
        ROWS_KEY=row_key(num_rows),
        BY_BLOCK=block_size is not None,
        EVEN_TO=num_inputs & -num_inputs,
    )
    return out
