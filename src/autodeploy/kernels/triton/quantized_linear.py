"""quantized_linear: bound by reading the weight at few rows, by scaling sums of blocks at many.

Many rows are rounded first, by a launch of their own; one is rounded by every program that needs it, and is one launch.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher, row_key, why_refused
from autodeploy.kernels.triton.packed_weights import (
    add_products,
    levels,
    load_levels,
    order,
    round_rows,
    why_not_packed,
)
from autodeploy.ops.quantized_linear import BLOCK, quantized_linear


@triton.jit(do_not_specialize=["num_rows", "ROWS_KEY"])
def _rows(
    x,
    x_scales,
    weight,
    scales,
    offsets,
    bias,
    out,
    num_rows,
    num_inputs,
    num_outputs,
    num_tiles,
    num_blocks,
    group_blocks,
    num_groups,
    ROWS_KEY,
    BITS: tl.constexpr,
    BY_GROUP: tl.constexpr,
    EVEN_TO: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    EVEN: tl.constexpr = EVEN_TO % BLOCKS == 0
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(rows, num_rows - 1).to(tl.int64)
    tile = tl.program_id(1) * TILES
    sums = tl.zeros((BLOCKS, ROWS, TILES * 16), tl.float32)
    for block in tl.range(0, num_blocks, BLOCKS):
        if x_scales is None:
            inputs = (block * 32 + order(BITS, BLOCKS))[None, :]
            value = tl.load(x + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32)
            level, scale = levels(value, 1, BLOCKS)
            level = tl.broadcast_to(tl.permute(level, (1, 0, 2)), (BLOCKS, ROWS, 32))
            scale = tl.permute(scale, (1, 0))[:, :, None]
        else:
            level, scale = load_levels(own, block, num_blocks, x, x_scales, BLOCKS, EVEN)
        sums = add_products(
            *(sums, level, scale, weight, scales, offsets, tile, num_tiles, block, num_blocks),
            *(group_blocks, num_groups, BITS, BY_GROUP, TILES, BLOCKS, EVEN),
        )
    result = tl.sum(sums, 0)
    outputs = tile * 16 + tl.arange(0, TILES * 16)
    if not BY_GROUP:
        result *= tl.load(scales + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[None, :]
    inside = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
    target = out + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def _configuration(rows: int, tiles: int, blocks: int, num_warps: int, num_stages: int) -> Any:
    values = {"ROWS": rows, "TILES": tiles, "BLOCKS": blocks}
    return triton.Config(values, num_warps=num_warps, num_stages=num_stages)


_multiply = Launcher(
    _rows,
    [
        _configuration(16, 2, 4, 4, 4),
        _configuration(16, 1, 8, 4, 4),
        _configuration(16, 2, 8, 4, 3),
        _configuration(16, 4, 4, 4, 3),
        _configuration(32, 4, 2, 4, 4),
        _configuration(64, 4, 1, 4, 4),
        _configuration(128, 4, 1, 8, 4),
    ],
    key=("num_inputs", "num_outputs", "BITS", "num_groups", "ROWS_KEY"),
)


def _supports(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> str | None:
    return why_not_packed(weight, scales, offsets) or why_refused(x, bias)


@quantized_linear.kernel("triton", _supports)
def quantized_linear_triton(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """`quantized_linear` with sums of whole numbers in each block of inputs."""
    num_inputs = x.shape[-1]
    num_rows = x.numel() // num_inputs
    x, weight, scales = x.contiguous(), weight.contiguous(), scales.contiguous()
    offsets, bias = (None if part is None else part.contiguous() for part in (offsets, bias))
    out = x.new_empty(*x.shape[:-1], num_outputs)
    num_tiles, num_blocks, bits = weight.shape[:3]
    num_groups = scales.shape[1]
    rows, x_scales = (x, None) if num_rows == 1 else round_rows(x.view(num_rows, num_inputs), bits)
    _multiply(
        lambda values: (triton.cdiv(num_rows, values["ROWS"]), triton.cdiv(num_tiles, values["TILES"])),
        *(rows, x_scales, weight, scales, offsets, bias, out),
        *(num_rows, num_inputs, num_outputs, num_tiles, num_blocks),
        *(max(1, num_inputs // num_groups // BLOCK), num_groups),
        ROWS_KEY=row_key(num_rows),
        BITS=bits,
        BY_GROUP=num_groups > 1 or offsets is not None,
        EVEN_TO=num_blocks & -num_blocks,
    )
    return out
