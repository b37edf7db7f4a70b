"""Quantising: rows of a matrix go in; numbers, scales and what else a format has come out, as its op reads them.

A format is a dataclass with the members of `NumberFormat`, added to `WeightFormat`.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.fp8_linear import FLOAT8, LARGEST_FLOAT8, as_float8
from autodeploy.ops.nvfp4_linear import GROUP_SIZE, LEVELS
from autodeploy.ops.quantized_linear import TILE, pack, packed_shape

Part = Literal["numbers", "scales", "offsets", "tensor_scale"]

_LEAST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0
"""Of float16; a group of zeros has the least."""
_LEAST_LARGEST = 1e-30
"""A matrix of magnitudes below it is zero."""
_REACHES = (8.0, 7.5, 7.0, 8.5)
"""With 4 bits: the level at which a group's largest weight is tried. Beyond 8 it is cut off, for finer steps."""


@dataclass(frozen=True)
class NumberFormat:
    """Whole numbers for `quantized_linear`.

    Attributes:
        bits: 8 or 4 per weight.
        group_size: inputs that share a scale; None for whole rows.
        has_offsets: numbers count from a group's least weight to its largest; else from below zero to above it.
    """

    bits: int
    group_size: int | None
    has_offsets: bool = False

    def __str__(self) -> str:
        shared = "row" if self.group_size is None else f"{self.group_size} inputs"
        return f"int{self.bits} per {shared}{', with offsets' if self.has_offsets else ''}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a weight is stored as."""
        return ("numbers", "scales", "offsets") if self.has_offsets else ("numbers", "scales")

    @property
    def name(self) -> str:
        """Of the numbers; weights get names with it."""
        return f"int{self.bits}"

    @property
    def rows_together(self) -> int:
        """Rows that are quantised together; a matrix may be cut between any of them."""
        return TILE

    def num_groups(self, num_inputs: int) -> int:
        """Scales per row."""
        return 1 if self.group_size is None else num_inputs // self.group_size

    def shape(self, part: Part, num_outputs: int, num_inputs: int) -> tuple[int, ...]:
        """Of a part of a matrix `[num_outputs, num_inputs]`."""
        if part == "numbers":
            return packed_shape(num_outputs, num_inputs, self.bits)
        return -(-num_outputs // TILE), self.num_groups(num_inputs), TILE

    def dtype(self, part: Part) -> torch.dtype:
        """Of a part."""
        return torch.uint8 if part == "numbers" else torch.float16

    def quantize(self, rows: Tensor, largest: float | None) -> dict[Part, Tensor]:
        """The parts of some rows `[O, I]` of a matrix.

        Args:
            largest: the largest magnitude of the whole matrix, where `parts` has a scale of all of it.
        """
        return quantize_rows(rows, self)


@dataclass(frozen=True)
class Float8Format:
    """Floating point of 8 bits for `fp8_linear`: 4 of exponent, 3 of mantissa.

    Attributes:
        block_size: rows and inputs that share a scale; None for whole rows.
    """

    block_size: int | None = None

    @property
    def group_size(self) -> None:
        """There may be any number of inputs, in whole groups or not."""
        return None

    def __str__(self) -> str:
        size = self.block_size
        return f"float8_e4m3fn per {'row' if size is None else f'block of {size} x {size}'}"

    @property
    def parts(self) -> tuple[Part, ...]:
        return "numbers", "scales"

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def rows_together(self) -> int:
        return self.block_size or 1

    def shape(self, part: Part, num_outputs: int, num_inputs: int) -> tuple[int, ...]:
        if part == "numbers":
            return num_outputs, num_inputs
        size = self.block_size
        return (num_outputs, 1) if size is None else (-(-num_outputs // size), -(-num_inputs // size))

    def dtype(self, part: Part) -> torch.dtype:
        return FLOAT8 if part == "numbers" else torch.float32

    def quantize(self, rows: Tensor, largest: float | None) -> dict[Part, Tensor]:
        if self.block_size is None:
            numbers, scales = as_float8(rows, None)
            return {"numbers": numbers, "scales": scales}
        size, (num_outputs, num_inputs) = self.block_size, rows.shape
        padded = F.pad(rows.float(), (0, -num_inputs % size, 0, -num_outputs % size))
        blocks: Tensor = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
        numbers, scales = as_float8(blocks.flatten(2), None)
        whole = numbers.unflatten(2, (size, size)).transpose(1, 2).flatten(2).flatten(0, 1)
        return {"numbers": whole[:num_outputs, :num_inputs], "scales": scales[..., 0]}


@dataclass(frozen=True)
class Float4Format:
    """Floating point of 4 bits for `nvfp4_linear`, a float8 scale per 16 inputs and one in float32 for all."""

    def __str__(self) -> str:
        return f"nvfp4 per {self.group_size} inputs"

    @property
    def parts(self) -> tuple[Part, ...]:
        return "numbers", "scales", "tensor_scale"

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def rows_together(self) -> int:
        return 1

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return GROUP_SIZE

    def shape(self, part: Part, num_outputs: int, num_inputs: int) -> tuple[int, ...]:
        if part == "tensor_scale":
            return (1,)
        return num_outputs, num_inputs // (2 if part == "numbers" else GROUP_SIZE)

    def dtype(self, part: Part) -> torch.dtype:
        return {"numbers": torch.uint8, "scales": FLOAT8}.get(part, torch.float32)

    def quantize(self, rows: Tensor, largest: float | None) -> dict[Part, Tensor]:
        assert largest is not None
        tensor_scale = torch.tensor([max(largest, _LEAST_LARGEST) / (LEVELS[-1] * LARGEST_FLOAT8)], device=rows.device)
        groups: Tensor = rows.float().unflatten(1, (-1, GROUP_SIZE))
        scales = (groups.abs().amax(-1) / LEVELS[-1] / tensor_scale).to(FLOAT8)
        steps = (scales.float() * tensor_scale)[..., None]
        codes = _nearest_codes(torch.where(steps == 0, 0.0, groups / steps)).flatten(1)
        return {"numbers": codes[:, ::2] | codes[:, 1::2] << 4, "scales": scales, "tensor_scale": tensor_scale}


def _nearest_codes(values: Tensor) -> Tensor:
    """The 4-bit floating point numbers nearest to values, half way the even one, beyond the largest that: uint8."""
    magnitudes = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for code, (lower, upper) in enumerate(itertools.pairwise(LEVELS)):
        middle = (lower + upper) / 2
        codes += magnitudes > middle if code % 2 == 0 else magnitudes >= middle
    return codes | (values < 0).to(torch.uint8) << 3


WeightFormat = NumberFormat | Float8Format | Float4Format
"""How a weight may be stored."""


def quantize_rows(rows: Tensor, number_format: NumberFormat) -> dict[Part, Tensor]:
    """`numbers`, `scales` and, where the format has them, `offsets` of a matrix `[O, I]`, tiles of outputs first."""
    bits = number_format.bits
    groups: Tensor = rows.float().unflatten(1, (number_format.num_groups(rows.shape[1]), -1))
    parts: dict[Part, Tensor] = {}
    if number_format.has_offsets:
        numbers, scales, offsets = _between_extremes(groups, bits)
        parts["offsets"] = _tiled(offsets)
    elif bits == 4:
        numbers, scales = _around_zero_by_least_error(groups)
    else:
        scales = _as_scales(groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1))
        numbers = _levels(groups, scales, bits) + 2 ** (bits - 1)
    return {"numbers": pack(numbers.to(torch.uint8).flatten(1), bits), "scales": _tiled(scales), **parts}


def _between_extremes(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from the least weight, the offset, to the largest."""
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    scales = _as_scales((largest - least) / (2**bits - 1))
    offsets = least.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half().float()
    return ((groups - offsets) / scales).round_().clamp_(0, 2**bits - 1), scales, offsets


def _around_zero_by_least_error(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sixteen levels have no middle: the side with the largest weight gets the eighth.

    Of several steps the best is taken, each fitted to the levels that it gives.
    """
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    found: list[tuple[Tensor, Tensor]] = []
    for reach in _REACHES:
        levels = _levels(groups, _as_scales(extreme / -reach), 4)
        fitted = (groups * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp_min(1.0)
        scales = _as_scales(fitted)
        levels = _levels(groups, scales, 4)
        error = (levels * scales - groups).square_().sum(-1, keepdim=True)
        found.append((scales, error))
    errors = torch.stack([error for _, error in found])
    scales = torch.stack([scales for scales, _ in found]).gather(0, errors.argmin(0, keepdim=True))[0]
    return _levels(groups, scales, 4) + 8, scales


def _levels(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (groups / scales).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _as_scales(scales: Tensor) -> Tensor:
    """Scales as they will be stored, float16, so that weights are rounded to the levels there will be."""
    bounded = scales.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half().float()
    return torch.where(bounded == 0, _LEAST_SCALE, bounded)


def _tiled(by_group: Tensor) -> Tensor:
    """`[O, G, 1]` to float16 `[⌈O/16⌉, G, 16]`."""
    padded = F.pad(by_group[..., 0], (0, 0, 0, -by_group.shape[0] % TILE))
    tiled: Tensor = padded.unflatten(0, (-1, TILE))
    return tiled.transpose(1, 2).half().contiguous()
