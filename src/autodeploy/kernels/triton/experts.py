"""Products of rows with the weights of experts: rows of an expert are multiplied together, in tiles.

Which rows an expert has is known on the device alone. There are as many programs as tiles there could be at most, and
each finds its expert in the running number of tiles; what is left over ends at once. So a launch depends on shapes only
and can be captured in a CUDA graph. A token or two are not worth sorting: then every choice is a tile of its own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import activated, dot
from autodeploy.kernels.triton.float4 import float4_tile
from autodeploy.kernels.triton.float8 import add_block
from autodeploy.kernels.triton.launch import Launcher, row_key, tile_sizes
from autodeploy.kernels.triton.packed_weights import add_products, load_levels
from autodeploy.ops.quantized_linear import BLOCK

_UNSORTED_TOKENS = 2
PLAIN = 16
"""In place of a number of bits: a weight of the dtype of what it is multiplied with; float8 numbers have scales."""
FLOAT4 = 0
"""The same: numbers of 4-bit floating point, with scales of groups, and one of all in the place of offsets."""


@triton.jit
def _find_tile(order, borders, num_experts, SORTED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, choices `[ROWS]` and which of them there are, of this program's tile; expert -1 where there is none."""
    tile = tl.program_id(0)
    if not SORTED:
        return tl.load(order + tile), tile + tl.zeros((ROWS,), tl.int64), tl.arange(0, ROWS) == 0
    else:
        experts = tl.arange(0, EXPERTS)
        is_one = experts < num_experts
        starts = tl.load(borders + experts, mask=is_one, other=0)
        counts = tl.load(borders + experts + 1, mask=is_one, other=0) - starts
        tiles = (counts + ROWS - 1) // ROWS
        ends = tl.cumsum(tiles, 0)
        is_own = (ends > tile) & (ends - tiles <= tile)
        expert = tl.max(tl.where(is_own, experts, -1), 0)
        first = tl.sum(tl.where(is_own, starts + (tile - (ends - tiles)) * ROWS, 0), 0)
        end = tl.sum(tl.where(is_own, starts + counts, 0), 0)
        places = first + tl.arange(0, ROWS)
        is_there = places < end
        # Beyond the tile's end its last choice stands in, as what other choices have may not be computed.
        return expert, tl.load(order + tl.maximum(tl.minimum(places, end - 1), 0)), is_there


@triton.jit
def _plain_tile(weight, columns, start, num_inputs, INPUTS: tl.constexpr, EVEN: tl.constexpr):
    inputs = start + tl.arange(0, INPUTS)[:, None]
    own = weight + columns.to(tl.int64)[None, :] * num_inputs + inputs
    return tl.load(own) if EVEN else tl.load(own, mask=inputs < num_inputs, other=0.0)


@triton.jit
def _plain_sums(
    x,
    x_scales,
    rows,
    weight,
    scales,
    column,
    half,
    num_columns,
    num_inputs,
    num_groups,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    BY_BLOCK: tl.constexpr,
):
    """Products `[ROWS, COLUMNS]` with a weight's rows from `column` on, and where GATED from `half + column` on."""
    columns = tl.minimum(column + tl.arange(0, COLUMNS), num_columns - 1)
    up_columns = tl.minimum(half + columns, num_columns - 1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    own = x + rows[:, None] * num_inputs
    for start in tl.range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)[None, :]
        value = tl.load(own + inputs) if EVEN else tl.load(own + inputs, mask=inputs < num_inputs, other=0.0)
        gate = _plain_tile(weight, columns, start, num_inputs, INPUTS, EVEN)
        sums = add_block(sums, value, gate, x_scales, scales, rows, columns, start, num_groups, BY_BLOCK)
        if GATED:
            up = _plain_tile(weight, up_columns, start, num_inputs, INPUTS, EVEN)
            ups = add_block(ups, value, up, x_scales, scales, rows, up_columns, start, num_groups, BY_BLOCK)
    if x_scales is not None and not BY_BLOCK:
        scale = tl.load(x_scales + rows)[:, None]
        sums *= scale
        ups *= scale
    return sums, ups


@triton.jit
def _float4_sums(
    x,
    rows,
    weight,
    scales,
    tensor_scale,
    column,
    half,
    num_columns,
    num_inputs,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """As `_plain_sums`."""
    columns = tl.minimum(column + tl.arange(0, COLUMNS), num_columns - 1)
    up_columns = tl.minimum(half + columns, num_columns - 1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    own = x + rows[:, None] * num_inputs
    for start in tl.range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)[None, :]
        value = tl.load(own + inputs) if EVEN else tl.load(own + inputs, mask=inputs < num_inputs, other=0.0)
        gate = float4_tile(weight, scales, columns, start, num_inputs, INPUTS, EVEN)
        sums = dot(value, tl.trans(gate.to(value.dtype)), sums)
        if GATED:
            up = float4_tile(weight, scales, up_columns, start, num_inputs, INPUTS, EVEN)
            ups = dot(value, tl.trans(up.to(value.dtype)), ups)
    scale = tl.load(tensor_scale).to(tl.float32)
    return sums * scale, ups * scale


@triton.jit
def _packed_sums(
    x,
    x_scales,
    rows,
    weight,
    scales,
    offsets,
    first_row,
    column,
    half,
    num_columns,
    num_blocks,
    group_blocks,
    num_groups,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    BY_GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """As `_plain_sums`; without groups they lack the scale of each row of the weight."""
    TILES: tl.constexpr = COLUMNS // 16
    sums = tl.zeros((BLOCKS, ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((BLOCKS, ROWS, COLUMNS), tl.float32)
    num_tiles = num_columns // 16
    weight += first_row * (num_blocks * BITS * 4)
    scales += first_row * num_groups
    if offsets is not None:
        offsets += first_row * num_groups
    for block in tl.range(0, num_blocks, BLOCKS):
        level, scale = load_levels(rows, block, num_blocks, x, x_scales, BLOCKS, EVEN)
        sums = add_products(
            *(sums, level, scale, weight, scales, offsets, column // 16, num_tiles, block, num_blocks),
            *(group_blocks, num_groups, BITS, BY_GROUP, TILES, BLOCKS, EVEN),
        )
        if GATED:
            ups = add_products(
                *(ups, level, scale, weight, scales, offsets, (half + column) // 16, num_tiles, block, num_blocks),
                *(group_blocks, num_groups, BITS, BY_GROUP, TILES, BLOCKS, EVEN),
            )
    return tl.sum(sums, 0), tl.sum(ups, 0)


@triton.jit
def _scaled_and_shifted(
    sums,
    scales,
    bias,
    first_row,
    column,
    num_columns,
    BY_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = column + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    if scales is not None and not BY_GROUP:
        sums *= tl.load(scales + first_row + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        sums += tl.load(bias + first_row + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _gated(gate, up, limit, up_offset, ACTIVATION: tl.constexpr):
    if limit is not None:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return activated(gate, ACTIVATION) * (up + up_offset)


@triton.jit(do_not_specialize=["CHOICES_KEY"])
def _expert_rows(
    x, x_scales, order, borders, weight, scales, offsets, bias, out, rows_each, num_experts, num_inputs, num_outputs,
    limit, up_offset, group_blocks, num_groups, CHOICES_KEY,
    SORTED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BITS: tl.constexpr, BY_GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, EVEN_TO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = EVEN_TO % INPUTS == 0
    expert, choices, is_there = _find_tile(order, borders, num_experts, SORTED, EXPERTS, ROWS)
    if (expert < 0) | (expert >= num_experts):
        return
    half = num_outputs if GATED else 0
    weight_rows = num_outputs + half
    first_row = expert.to(tl.int64) * weight_rows
    column = tl.program_id(1) * COLUMNS
    if BITS == 16:
        sums, ups = _plain_sums(
            *(x, x_scales, choices // rows_each, weight + first_row * num_inputs),
            *(None if scales is None else scales + first_row // 128 * num_groups, column, half, weight_rows),
            *(num_inputs, num_groups, GATED, EVEN, ROWS, COLUMNS, INPUTS, BY_GROUP),
        )
    elif BITS == 0:
        sums, ups = _float4_sums(
            *(x, choices // rows_each, weight + first_row * (num_inputs // 2), scales + first_row * num_groups),
            *(offsets, column, half, weight_rows, num_inputs, GATED, EVEN, ROWS, COLUMNS, INPUTS),
        )
    else:
        sums, ups = _packed_sums(
            *(x, x_scales, choices // rows_each, weight, scales, offsets, first_row),
            *(column, half, weight_rows, num_inputs // 32),
            *(group_blocks, num_groups, GATED, BITS, BY_GROUP, EVEN, ROWS, COLUMNS, INPUTS // 32),
        )
    sums = _scaled_and_shifted(sums, scales, bias, first_row, column, weight_rows, BY_GROUP, COLUMNS)
    if GATED:
        ups = _scaled_and_shifted(ups, scales, bias, first_row, half + column, weight_rows, BY_GROUP, COLUMNS)
        sums = _gated(sums, ups, limit, up_offset, ACTIVATION)
    elif ACTIVATION is not None:
        sums = activated(sums, ACTIVATION)
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    target = out + choices[:, None] * num_outputs + columns
    tl.store(target, sums.to(out.dtype.element_ty), mask=is_there[:, None] & (columns < num_outputs))


_KEY = ("num_inputs", "num_outputs", "num_experts", "GATED", "BITS", "num_groups", "BY_GROUP", "CHOICES_KEY")

_multiply = Launcher(
    _expert_rows,
    [
        tile_sizes(16, 32, 128, 4, 3),
        tile_sizes(16, 64, 128, 4, 3),
        tile_sizes(16, 32, 64, 4, 4),
        tile_sizes(32, 64, 64, 4, 3),
        tile_sizes(64, 64, 64, 4, 3),
        tile_sizes(128, 64, 64, 8, 3),
    ],
    _KEY,
)
_multiply_float8 = Launcher(
    _expert_rows,
    [
        tile_sizes(16, 32, 128, 4, 4),
        tile_sizes(16, 64, 128, 4, 3),
        tile_sizes(32, 64, 128, 4, 3),
        tile_sizes(64, 32, 128, 4, 3),
        tile_sizes(128, 32, 128, 8, 3),
    ],
    _KEY,
)
_multiply_float4 = Launcher(
    _expert_rows,
    [
        tile_sizes(16, 32, 128, 4, 4),
        tile_sizes(16, 16, 256, 4, 4),
        tile_sizes(16, 64, 128, 4, 3),
        tile_sizes(64, 32, 64, 4, 3),
        tile_sizes(128, 32, 64, 8, 3),
    ],
    _KEY,
)
_multiply_packed = Launcher(
    _expert_rows,
    [
        tile_sizes(16, 32, 128, 4, 3),
        tile_sizes(16, 16, 128, 4, 4),
        tile_sizes(16, 32, 64, 4, 4),
        tile_sizes(64, 32, 32, 4, 4),
        tile_sizes(128, 32, 32, 8, 4),
    ],
    _KEY,
)


@triton.jit
def _sum_choices(values, indices, weights, out, num_experts, width, NUM_CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(NUM_CHOICES):
        choice = token * NUM_CHOICES + place
        expert = tl.load(indices + choice)
        if (expert >= 0) & (expert < num_experts):
            value = tl.load(values + choice * width + columns, mask=inside, other=0.0).to(tl.float32)
            total += value * tl.load(weights + choice).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


_sum = Launcher(_sum_choices)


def sum_choices(values: Tensor, indices: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Σₖ weights[n, k] · values[n, k] of the choices that are experts: `[N, K, H]` to `[N, H]` of a dtype."""
    num_tokens, num_choices, width = values.shape
    out = values.new_empty(num_tokens, width, dtype=dtype)
    block = min(1024, triton.next_power_of_2(width))
    grid = (num_tokens, triton.cdiv(width, block))
    _sum(grid, values, indices, weights, out, num_experts, width, NUM_CHOICES=num_choices, BLOCK=block)
    return out


@dataclass(frozen=True)
class Routing:
    """Who goes where: choices in the order of experts, and where each expert's begin; unsorted, experts and nothing.

    Attributes:
        order: int64 `[N · K]`: numbers of choices by expert, or, where `borders` is None, the expert of each choice.
        borders: int64 `[E + 1]`.
        num_experts: E.
    """

    order: Tensor
    borders: Tensor | None
    num_experts: int

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> "Routing":
        """From chosen experts `[N, K]`; what is no expert is left out."""
        flat = indices.reshape(-1)
        if indices.shape[0] <= _UNSORTED_TOKENS:
            return cls(flat.contiguous(), None, num_experts)
        experts, order = flat.sort(stable=True)
        borders = torch.searchsorted(experts, torch.arange(num_experts + 1, device=experts.device))
        return cls(order, borders, num_experts)

    def num_tiles(self, rows: int) -> int:
        """Most tiles of so many rows that there can be."""
        num_choices = self.order.numel()
        return num_choices if self.borders is None else num_choices // rows + min(num_choices, self.num_experts)


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


@dataclass(frozen=True)
class ExpertWeight:
    """Weights of all experts: `[E, rows, I]`, or packed, with scales, offsets and what they are packed in.

    Attributes:
        num_groups: scales of a row; 1 where there are none.
        by_group: scales are applied while products are summed, not to the sums.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    offsets: Tensor | None = None
    bits: int = PLAIN
    num_groups: int = 1
    by_group: bool = False

    @classmethod
    def plain(cls, weight: Tensor, bias: Tensor | None) -> "ExpertWeight":
        """Of the dtype of what it is multiplied with."""
        return cls(weight.contiguous(), _contiguous(bias))

    @classmethod
    def packed(cls, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None) -> "ExpertWeight":
        """Of numbers of 8 or 4 bits."""
        parts = scales.contiguous(), _contiguous(offsets)
        groups = scales.shape[1], scales.shape[1] > 1 or offsets is not None
        return cls(weight.contiguous(), _contiguous(bias), *parts, weight.shape[2], *groups)

    @classmethod
    def float8(cls, weight: Tensor, scales: Tensor, block_size: int | None, bias: Tensor | None) -> "ExpertWeight":
        """Of float8 numbers, multiplied with such numbers."""
        parts = weight.contiguous(), _contiguous(bias), scales.contiguous()
        return cls(*parts, num_groups=scales.shape[1], by_group=block_size is not None)

    @classmethod
    def float4(cls, weight: Tensor, scales: Tensor, tensor_scale: Tensor, bias: Tensor | None) -> "ExpertWeight":
        """Of 4-bit floating point numbers, multiplied with what it is given."""
        parts = weight.contiguous(), _contiguous(bias), scales.contiguous().view(torch.uint8), tensor_scale
        return cls(*parts, FLOAT4, scales.shape[1], by_group=True)


@dataclass(frozen=True)
class Gate:
    """What stands between an expert's two products, as `expert_gate` takes it."""

    activation: str
    gated: bool
    limit: float | None
    up_offset: float


def multiply_rows(
    x: Tensor,
    routing: Routing,
    weight: ExpertWeight,
    num_outputs: int,
    gate: Gate | None = None,
    *,
    rows_each: int,
    x_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight[e] · x[choice // rows_each] + bias[e]` of each choice, or `expert_gate` of it: `[choices, num_outputs]`.

    Args:
        x: `[rows, I]`, contiguous; with a weight of float8 or packed numbers what `round_to_float8` or `round_rows`
            gave, as x_scales is.
        dtype: of the result; None for x's.
    Returns:
        In the order in which choices are numbered; for choices that are no expert undefined, or with x_scales 0.
    """
    num_inputs, num_choices, num_groups = x.shape[1], routing.order.numel(), weight.num_groups
    make = x.new_empty if x_scales is None else x.new_zeros  # every row is rounded next, also of no expert
    out = make(num_choices, num_outputs, dtype=dtype)
    if x_scales is None:
        multiply = _multiply if weight.bits == PLAIN else _multiply_float4
    else:
        multiply = _multiply_float8 if weight.bits == PLAIN else _multiply_packed
    multiply(
        lambda values: (routing.num_tiles(values["ROWS"]), triton.cdiv(num_outputs, values["COLUMNS"])),
        *(x, x_scales, routing.order, routing.borders),
        *(weight.weight, weight.scales, weight.offsets, weight.bias, out),
        *(rows_each, routing.num_experts, num_inputs, num_outputs),
        *((None, 0.0) if gate is None else (gate.limit, gate.up_offset)),
        *(max(1, num_inputs // num_groups // BLOCK), num_groups),
        CHOICES_KEY=row_key(num_choices),
        SORTED=routing.borders is not None,
        ACTIVATION=None if gate is None else gate.activation,
        GATED=gate is not None and gate.gated,
        BITS=weight.bits,
        BY_GROUP=weight.by_group,
        EXPERTS=triton.next_power_of_2(routing.num_experts),
        EVEN_TO=num_inputs & -num_inputs,
    )
    return out
