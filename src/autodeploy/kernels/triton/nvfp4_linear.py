"""nvfp4_linear on any device: 4-bit numbers become a tile of the activations' dtype in registers, exactly.

A number times its scale has 6 significant bits, which bfloat16 and float16 hold; the scale of the whole weight goes to
the sums. Both kinds of numbers are decoded by their bits, which a float16 has room for, so that no device needs to know
them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.launch import Launcher, row_key, tile_sizes, why_refused
from autodeploy.ops.fp8_linear import FLOAT8
from autodeploy.ops.nvfp4_linear import GROUP_SIZE, nvfp4_linear


@triton.jit
def _decoded(codes):
    """4-bit codes as float32 numbers times 2^-14: sign, exponent and mantissa where a float16 has them."""
    bits = ((codes & 8).to(tl.int16) << 12) | ((codes & 7).to(tl.int16) << 9)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _tile(weight, scales, columns, start, num_inputs, INPUTS: tl.constexpr, EVEN: tl.constexpr):
    """The inputs from `start` on of a weight's rows `columns`, float32 `[columns, INPUTS]`, zero beyond the last."""
    COLUMNS: tl.constexpr = columns.shape[0]
    place = start // 2 + tl.arange(0, INPUTS // 2)[None, :]
    own = weight + columns.to(tl.int64)[:, None] * (num_inputs // 2) + place
    codes = tl.load(own) if EVEN else tl.load(own, mask=place < num_inputs // 2, other=0)
    numbers = tl.reshape(tl.join(_decoded(codes & 15), _decoded(codes >> 4)), (COLUMNS, INPUTS // 16, 16))
    place = start // 16 + tl.arange(0, INPUTS // 16)[None, :]
    own = scales + columns.to(tl.int64)[:, None] * (num_inputs // 16) + place
    scale = tl.load(own) if EVEN else tl.load(own, mask=place < num_inputs // 16, other=0)
    # The bits of a float8_e4m3fn without sign in a float16 are it times 2^-8.
    scale = (scale.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 4194304.0
    return tl.reshape(numbers * scale[:, :, None], (COLUMNS, INPUTS))


@triton.jit
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
        tile = _tile(weight, scales, own_columns, start, num_inputs, INPUTS, EVEN)
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
    if weight.dtype != torch.uint8 or scales.dtype != FLOAT8 or 0 in weight.shape:
        return (
            f"a weight {weight.dtype} {tuple(weight.shape)} with scales {scales.dtype}; it must be uint8, float8_e4m3fn"
        )
    if x.shape[-1] % GROUP_SIZE:
        return f"{x.shape[-1]} inputs, no multiple of {GROUP_SIZE}"
    return why_refused(x, bias)


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
