"""8-bit floating point: rows rounded to float8_e4m3fn numbers with scales, as `ops/fp8_linear.py` has them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import INTERPRETED, dot
from autodeploy.kernels.triton.launch import Launcher, row_key
from autodeploy.ops.fp8_linear import BLOCK_SIZE, FLOAT8

LEAST_CAPABILITY = (8, 9)
"""Compute capability from which on devices convert to these numbers and multiply them."""
_COLUMNS_AT_ONCE = 4096
_BLOCKS_AT_ONCE = 16


def why_no_float8(device: torch.device) -> str | None:
    """The reason that a device cannot convert to float8_e4m3fn, or None."""
    if device.type != "cuda":
        return None  # where kernels are interpreted, or written down
    found = torch.cuda.get_device_capability(device)
    if found >= LEAST_CAPABILITY:
        return None
    return (
        f"compute capability {found[0]}.{found[1]}; 8-bit floating point takes {'.'.join(map(str, LEAST_CAPABILITY))}"
    )


@triton.jit
def to_float8(x, dtype: tl.constexpr):
    """float32 values as float8 of a dtype, half way to the even one; none may be larger than the largest there is.

    Triton's interpreter (3.6 to 3.9) does not round, so there values are rounded before: numbers of e4m3 have 3 bits of
    mantissa down to 2^-6 and steps of 2^-9 below, those of e5m2 2 bits down to 2^-14 and steps of 2^-16.
    """
    if INTERPRETED:
        IS_E4M3: tl.constexpr = dtype == tl.float8e4nv
        DROPPED: tl.constexpr = 20 if IS_E4M3 else 21
        LEAST_NORMAL: tl.constexpr = 0.015625 if IS_E4M3 else 6.103515625e-05
        SHIFT: tl.constexpr = 24576.0 if IS_E4M3 else 192.0  # 1.5 times what has the step in its last bit
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
        normal = ((rounded >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < LEAST_NORMAL, (x + SHIFT) - SHIFT, normal)
    return x.to(dtype)


@triton.jit
def to_dtype(x, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """Values in a dtype. LARGEST: what larger ones become, where that is float8, else None; a NaN stays one."""
    if LARGEST is None:
        return x.to(dtype)
    else:
        bounded = tl.clamp(x.to(tl.float32), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        return to_float8(bounded, dtype)


@triton.jit
def _scales(largest, total):
    """Scales of the largest magnitudes; NaN where a total, zero times the sum, is none."""
    return tl.div_rn(tl.maximum(largest, 1e-30), largest * 0.0 + 448.0) + total


@triton.jit(do_not_specialize=["ROWS_KEY"])
def _round_rows(x, out, scales, num_columns, ROWS_KEY, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * num_columns + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        total += value * 0.0
    scale = _scales(tl.max(largest, 0), tl.sum(total, 0))
    tl.store(scales + row, scale)
    for start in tl.range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * num_columns + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        number = to_float8(tl.div_rn(value, value * 0.0 + scale), out.dtype.element_ty)
        tl.store(out + row * num_columns + columns, number, mask=columns < num_columns)


@triton.jit
def _round_blocks(x, out, scales, num_columns, num_blocks, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = columns < num_columns
    value = tl.load(x + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    scale = _scales(tl.max(tl.abs(value), 1), tl.sum(value * 0.0, 1))
    tl.store(scales + row * num_blocks + block, scale, mask=block < num_blocks)
    number = to_float8(tl.div_rn(value, value * 0.0 + scale[:, None]), out.dtype.element_ty)
    tl.store(out + row * num_columns + columns, number, mask=inside)


@triton.jit
def add_block(
    sums, value, number, x_scales, scales, rows, columns, start, num_groups, BY_BLOCK: tl.constexpr
):  # fmt: skip
    """The sums `[R, C]` and the products of some inputs from `start` on, which lie in one block of 128.

    Products of float8 numbers have a sum of their own before they are scaled and added, as tensor cores keep fewer bits
    of it than float32 has (arXiv 2412.19437, section 3.3.2).

    Args:
        value: `[R, inputs]`. number: `[inputs, C]`, of the same dtype.
        x_scales, scales: where BY_BLOCK, float32 `[rows, num_groups]` and `[columns // 128, num_groups]`.
    """
    if x_scales is None:
        sums = dot(value, number, sums)
    else:
        products = dot(value, number, tl.zeros(sums.shape, tl.float32))
        if BY_BLOCK:
            group = start // 128
            products *= tl.load(x_scales + rows * num_groups + group)[:, None]
            products *= tl.load(scales + columns // 128 * num_groups + group).to(tl.float32)[None, :]
        sums += products
    return sums


_by_row = Launcher(
    _round_rows,
    [triton.Config({}, num_warps=4), triton.Config({}, num_warps=16)],
    key=("num_columns", "ROWS_KEY"),
)
_by_block = Launcher(_round_blocks)


def round_to_float8(x: Tensor, block_size: int | None) -> tuple[Tensor, Tensor]:
    """Contiguous x `[N, I]` as float8 numbers and float32 scales: `[N, I]` and `[N, 1]`, or `[N, ⌈I/128⌉]`."""
    num_rows, num_columns = x.shape
    out = torch.empty_like(x, dtype=FLOAT8)
    if block_size is None:
        scales = x.new_empty(num_rows, 1, dtype=torch.float32)
        block = min(_COLUMNS_AT_ONCE, triton.next_power_of_2(num_columns))
        _by_row((num_rows,), x, out, scales, num_columns, ROWS_KEY=row_key(num_rows), BLOCK=block)
        return out, scales
    num_blocks = triton.cdiv(num_columns, BLOCK_SIZE)
    scales = x.new_empty(num_rows, num_blocks, dtype=torch.float32)
    blocks = min(_BLOCKS_AT_ONCE, triton.next_power_of_2(num_blocks))
    grid = (num_rows, triton.cdiv(num_blocks, blocks))
    _by_block(grid, x, out, scales, num_columns, num_blocks, BLOCKS=blocks)
    return out, scales


def why_not_float8(weight: Tensor, scales: Tensor, block_size: int | None) -> str | None:
    """The reason that these are no weight of float8 numbers that there are kernels for, or None."""
    if weight.dtype != FLOAT8 or weight.dim() != 2 or 0 in weight.shape:
        return f"a weight {weight.dtype} {tuple(weight.shape)}; it must be float8_e4m3fn numbers"
    if block_size not in (None, BLOCK_SIZE):
        return f"blocks of {block_size}; there are kernels for {BLOCK_SIZE}"
    return why_no_float8(weight.device)
