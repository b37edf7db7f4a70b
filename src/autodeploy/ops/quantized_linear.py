"""Products with weights of 8 or 4 bits, and the layout that such weights have.

A weight is a matrix of small whole numbers and a scale per row, or per group of inputs in a row. A number stands for
`scale · (number - half of the range)`; or, where there are offsets, for `scale · number + offset`. Numbers lie in
tiles of `TILE` outputs by `BLOCK` inputs, in which four inputs of each output follow each other: the order in which
every machine's dot products of bytes take them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import Work, op

TILE = 16
"""Outputs that lie side by side."""
BLOCK = 32
"""Inputs that follow each other, and that share a scale when activations are rounded."""
QUAD = 4
_LARGEST = 127.0
_SMALLEST = 1e-30
"""A block of activations below it is zero: its scale would have no inverse."""


def packed_shape(num_outputs: int, num_inputs: int, bits: int) -> tuple[int, int, int, int, int]:
    """Shape of the bytes of a packed weight: tiles, blocks, quads of bytes, outputs, bytes."""
    return -(-num_outputs // TILE), -(-num_inputs // BLOCK), bits, TILE, QUAD


def pack(numbers: Tensor, bits: int) -> Tensor:
    """`[O, I]` uint8 numbers below 2^bits to `packed_shape`, filled up with the number in the middle.

    With 4 bits a byte holds the inputs of two quads, the earlier in its lower half.
    """
    num_outputs, num_inputs = numbers.shape
    padding = (0, -num_inputs % BLOCK, 0, -num_outputs % TILE)
    tiled: Tensor = F.pad(numbers, padding, value=2 ** (bits - 1)).unflatten(0, (-1, TILE)).unflatten(2, (-1, 8, QUAD))
    quads = tiled.permute(0, 2, 3, 1, 4)
    return (quads if bits == 8 else quads[:, :, ::2] | quads[:, :, 1::2] << 4).contiguous()


def unpack(weight: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The numbers `[O, I]` of a packed weight."""
    if weight.shape[2] == 4:
        weight = torch.stack((weight & 15, weight >> 4), dim=3).flatten(2, 3)
    rows: Tensor = weight.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    return rows[:num_outputs, :num_inputs]


def dequantize(weight: Tensor, scales: Tensor, offsets: Tensor | None, num_outputs: int, num_inputs: int) -> Tensor:
    """The matrix `[O, I]` that a packed weight stands for, float32."""
    groups: Tensor = unpack(weight, num_outputs, num_inputs).float().unflatten(1, (scales.shape[1], -1))

    def by_group(values: Tensor) -> Tensor:
        rows: Tensor = values.float().transpose(1, 2).flatten(0, 1)
        return rows[:num_outputs, :, None]

    weights: Tensor
    if offsets is None:
        weights = (groups - 2 ** (weight.shape[2] - 1)) * by_group(scales)
    else:
        weights = groups * by_group(scales) + by_group(offsets)
    return weights.flatten(1)


def round_activations(x: Tensor) -> Tensor:
    """x rounded, in each block of `BLOCK` inputs, to 255 levels up to the block's largest magnitude; float32.

    A block that holds an infinity or a NaN is NaN throughout.
    """
    num_inputs = x.shape[-1]
    blocks: Tensor = F.pad(x.float(), (0, -num_inputs % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < _SMALLEST, 0.0, largest.reciprocal() * _LARGEST)
    rounded: Tensor = ((blocks * inverse).round() * (largest / _LARGEST)).flatten(-2)
    return rounded[..., :num_inputs]


def _fake(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs)


@op(tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}, fake=_fake, rounds_activations=True)
def quantized_linear(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """x · Wᵀ + bias with a weight of 8 or 4 bits, x rounded to 8 bits in blocks, so that products are of whole numbers.

    Args:
        x: `[..., I]`.
        weight: uint8 of `packed_shape`, `[⌈O/16⌉, ⌈I/32⌉, bits, 16, 4]`.
        scales: float16 `[⌈O/16⌉, G, 16]` for G groups of I/G inputs; more than one group are of whole blocks.
        offsets: as scales; what a number 0 of the group stands for.
        bias: `[O]`.
    Returns:
        `[..., O]`, summed in float32.
    """
    matrix = dequantize(weight, scales, offsets, num_outputs, x.shape[-1])
    return F.linear(round_activations(x), matrix, None if bias is None else bias.float()).to(x.dtype)


@quantized_linear.with_work
def _quantized_linear_work(x: Tensor, num_outputs: int, **_: Any) -> Work:
    return Work(flops_per_token=2 * int(x.shape[-1]) * num_outputs)


@quantized_linear.with_samples
def _quantized_linear_samples() -> list[dict[str, Any]]:
    def sample(
        rows: int, num_inputs: int, num_outputs: int, bits: int, groups: int = 1, **given: bool
    ) -> dict[str, Any]:
        numbers = torch.randint(0, 2**bits, (num_outputs, num_inputs), dtype=torch.uint8)
        shape = (-(-num_outputs // TILE), groups, TILE)
        step = num_inputs**-0.5 * 2.0 ** (2 - bits)
        return {
            "x": torch.randn(1, rows, num_inputs),
            "weight": pack(numbers, bits),
            "scales": ((torch.rand(shape) + 0.5) * step).half(),
            "offsets": (torch.randn(shape) * num_inputs**-0.5).half() if given.get("offsets") else None,
            "bias": torch.randn(num_outputs) if given.get("bias") else None,
            "num_outputs": num_outputs,
        }

    return [
        sample(1, 64, 48, 8),
        sample(9, 45, 37, 8, bias=True),
        sample(3, 128, 16, 8, groups=2, offsets=True),
        sample(1, 64, 40, 4, groups=2),
        sample(13, 128, 70, 4, groups=1, bias=True),
        sample(6, 256, 33, 4, groups=8, offsets=True, bias=True),
        sample(0, 32, 16, 4),
    ]
