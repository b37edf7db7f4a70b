"""Packed weights of 8 or 4 bits, rounded activations, and their products, as `ops/quantized_linear.py` has them.

A packed weight is read as it lies, tile by tile of 16 outputs by 32 inputs, and put in order in registers. Weights and
activations are whole numbers there, and are multiplied as such on tensor cores, exactly; each block of 32 inputs has a
sum of its own, which is scaled in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher
from autodeploy.ops.quantized_linear import BLOCK, QUAD, TILE

_ROUNDED_BLOCKS = 32
"""Blocks of activations that a program rounds."""


@triton.jit
def levels(x, ROWS: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Values `[rows, NUM_BLOCKS · 32]`, float32, as levels in -127..127, int8, and the scale of each block.

    A block that holds an infinity or a NaN has the scale NaN.

    Returns:
        `[rows, NUM_BLOCKS, 32]` and `[rows, NUM_BLOCKS]`.
    """
    blocks = tl.reshape(x, (ROWS, NUM_BLOCKS, 32))
    # Maxima pass over a NaN, sums do not; of zeros the sum is zero.
    largest = tl.max(tl.abs(blocks), 2) + tl.sum(blocks * 0.0, 2)
    inverse = tl.where(largest < 1e-30, 0.0, (1.0 / tl.where(largest < 1e-30, 1.0, largest)) * 127.0)
    # Half way goes to the even level: adding 1.5 · 2^23 leaves no room for a fraction.
    level = (blocks * inverse[:, :, None] + 12582912.0) - 12582912.0
    return level.to(tl.int8), largest / 127.0


@triton.jit
def order(BITS: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Which input stands at each place of `[NUM_BLOCKS · 32]`, in the order that `numbers` has.

    With 4 bits, of each block the lower halves of its bytes come first: both halves are then for the same thread.
    """
    place = tl.arange(0, NUM_BLOCKS * 32)
    if BITS == 8:
        return place
    else:
        return place // 32 * 32 + place % 16 // 4 * 8 + place % 32 // 16 * 4 + place % 4


@triton.jit
def numbers(
    weight,
    first_tile,
    num_tiles,
    block,
    num_blocks,
    BITS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Numbers `[BLOCKS, 32, TILES · 16]` counted from the middle, int8, inputs in `order`; any outside the weight.

    Args:
        weight: the first byte of `[num_tiles, num_blocks, BITS, 16, 4]`.
        first_tile, block: the first tile of outputs and block of inputs that are read.
        EVEN: num_blocks is a multiple of BLOCKS.
    """
    BYTES: tl.constexpr = BITS * 64
    tiles = tl.minimum(first_tile + tl.arange(0, TILES), num_tiles - 1)
    places = block * BYTES + tl.arange(0, BLOCKS * BYTES)
    own = weight + tiles.to(tl.int64)[:, None] * (num_blocks * BYTES) + places[None, :]
    found = tl.load(own) if EVEN else tl.load(own, mask=(places < num_blocks * BYTES)[None, :], other=0)
    if BITS == 8:
        quads = tl.reshape((found ^ 128).to(tl.int8, bitcast=True), (TILES, BLOCKS, 8, 16, 4))
        return tl.reshape(tl.permute(quads, (1, 2, 4, 0, 3)), (BLOCKS, 32, TILES * 16))
    else:
        low = (found & 15).to(tl.int8, bitcast=True) - 8
        high = (found >> 4).to(tl.int8, bitcast=True) - 8
        pairs = tl.reshape(tl.join(low, high), (TILES, BLOCKS, 4, 16, 4, 2))
        return tl.reshape(tl.permute(pairs, (1, 5, 2, 4, 0, 3)), (BLOCKS, 32, TILES * 16))


@triton.jit
def _by_group(
    values, first_tile, num_tiles, block, group_blocks, num_groups, TILES: tl.constexpr, BLOCKS: tl.constexpr
):
    """Scales or offsets `[BLOCKS, 1, TILES · 16]` of blocks, float32, from `[num_tiles, num_groups, 16]`."""
    outputs = tl.arange(0, TILES * 16)
    tiles = tl.minimum(first_tile + outputs // 16, num_tiles - 1)
    groups = tl.minimum((block + tl.arange(0, BLOCKS)) // group_blocks, num_groups - 1)
    own = values + (tiles[None, :] * num_groups + groups[:, None]) * 16 + (outputs % 16)[None, :]
    return tl.load(own).to(tl.float32)[:, None, :]


@triton.jit
def add_products(
    sums,
    level,
    level_scale,
    weight,
    scales,
    offsets,
    first_tile,
    num_tiles,
    block,
    num_blocks,
    group_blocks,
    num_groups,
    BITS: tl.constexpr,
    BY_GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The sums of each block, and the products of some blocks of rows with those of a weight.

    Args:
        sums: `[BLOCKS, rows, TILES · 16]`, float32.
        level: `[BLOCKS, rows, 32]`, int8. level_scale: `[BLOCKS, rows, 1]`, float32, zero for blocks that are none.
        BY_GROUP: scales and offsets are applied here; without, sums lack the one scale of each output.
    """
    number = numbers(weight, first_tile, num_tiles, block, num_blocks, BITS, TILES, BLOCKS, EVEN)
    if BLOCKS == 1:  # a batch of one would leave the whole tile to each warp
        plain = tl.dot(tl.reshape(level, level.shape[1:]), tl.reshape(number, number.shape[1:]), out_dtype=tl.int32)
        products = plain[None, :, :].to(tl.float32) * level_scale
    else:
        products = tl.dot(level, number, out_dtype=tl.int32).to(tl.float32) * level_scale
    if BY_GROUP:
        scale = _by_group(scales, first_tile, num_tiles, block, group_blocks, num_groups, TILES, BLOCKS)
        products *= scale
        if offsets is not None:
            MIDDLE: tl.constexpr = 2.0 ** (BITS - 1)
            offset = _by_group(offsets, first_tile, num_tiles, block, group_blocks, num_groups, TILES, BLOCKS)
            total = tl.sum(level.to(tl.int32), 2).to(tl.float32)[:, :, None] * level_scale
            products += total * (offset + MIDDLE * scale)
    return sums + products


@triton.jit
def load_levels(rows, block, num_blocks, rounded, scales, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """Of rows `[R]` of what `round_rows` gave, some blocks: `[BLOCKS, R, 32]` and `[BLOCKS, R, 1]`."""
    blocks = block + tl.arange(0, BLOCKS)[:, None, None]
    places = (rows * num_blocks)[None, :, None] + blocks
    own = rounded + places * 32 + tl.arange(0, 32)[None, None, :]
    if EVEN:
        return tl.load(own), tl.load(scales + places)
    inside = blocks < num_blocks
    return tl.load(own, mask=inside, other=0), tl.load(scales + places, mask=inside, other=0.0)


@triton.jit
def _round_rows(x, out, scales, num_columns, num_blocks, BITS: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * NUM_BLOCKS
    columns = (block * 32 + order(BITS, NUM_BLOCKS))[None, :]
    value = tl.load(x + row * num_columns + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    level, scale = levels(value, 1, NUM_BLOCKS)
    blocks = row * num_blocks + block + tl.arange(0, NUM_BLOCKS)[None, :]
    inside = (block + tl.arange(0, NUM_BLOCKS) < num_blocks)[None, :]
    tl.store(scales + blocks, scale, mask=inside)
    tl.store(out + blocks[:, :, None] * 32 + tl.arange(0, 32)[None, None, :], level, mask=inside[:, :, None])


_round = Launcher(_round_rows)


def round_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Contiguous x `[N, I]` as levels, int8 `[N, ⌈I/32⌉ · 32]` in the `order` of a weight, and scales `[N, ⌈I/32⌉]`."""
    num_rows, num_columns = x.shape
    num_blocks = triton.cdiv(num_columns, BLOCK)
    out = x.new_empty(num_rows, num_blocks * BLOCK, dtype=torch.int8)
    scales = x.new_empty(num_rows, num_blocks, dtype=torch.float32)
    blocks = min(_ROUNDED_BLOCKS, triton.next_power_of_2(num_blocks))
    grid = (num_rows, triton.cdiv(num_blocks, blocks))
    _round(grid, x, out, scales, num_columns, num_blocks, BITS=bits, NUM_BLOCKS=blocks, num_warps=2)
    return out, scales


def why_not_packed(weight: Tensor, scales: Tensor, offsets: Tensor | None) -> str | None:
    """The reason that these are no packed weight, or None."""
    if weight.dtype != torch.uint8 or weight.dim() != 5 or weight.shape[2] not in (4, 8):
        return f"a weight {weight.dtype} {tuple(weight.shape)}; it must be packed numbers of 4 or 8 bits"
    if tuple(weight.shape[3:]) != (TILE, QUAD) or 0 in weight.shape:
        return f"a weight of shape {tuple(weight.shape)}"
    if any(part is not None and part.dtype != torch.float16 for part in (scales, offsets)):
        return f"scales {scales.dtype}; they must be float16"
    return None
