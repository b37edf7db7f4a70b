"""Products with weights of 8-bit floating point (float8_e4m3fn), activations rounded to the same numbers.

A scale in float32 belongs to each row of a weight and each token, or to each block of 128 by 128 of a weight and each
128 inputs of a token (arXiv 2209.05433, arXiv 2412.19437). A number stands for scale · number.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import Work, op

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0
BLOCK_SIZE = 128
"""Rows and inputs of a block, where blocks have scales."""
SMALLEST = 1e-30
"""Activations below it all are as good as zero: their scale would have no inverse."""


def as_float8(x: Tensor, block_size: int | None) -> tuple[Tensor, Tensor]:
    """Rows `[..., I]` as float8 numbers, and a scale for each row or each block of inputs: float32 `[..., G]`.

    The largest magnitude that shares a scale becomes the largest number there is. Where one of them is an infinity or a
    NaN, the scale is none either.
    """
    num_inputs = x.shape[-1]
    size = block_size or num_inputs
    blocks: Tensor = F.pad(x.float(), (0, -num_inputs % size)).unflatten(-1, (-1, size))
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST_FLOAT8
    return (blocks / scales).to(FLOAT8).flatten(-2)[..., :num_inputs], scales[..., 0]


def spread(scales: Tensor, block_size: int | None, num_inputs: int) -> Tensor:
    """Scales of rows as `as_float8` gives them, by input: `[..., I]`, or `[..., 1]` where a row has one."""
    return scales if block_size is None else scales.repeat_interleave(block_size, -1)[..., :num_inputs]


def round_activations(x: Tensor, block_size: int | None) -> Tensor:
    """What x `[..., I]` stands for as float8 numbers with scales, float32."""
    numbers, scales = as_float8(x, block_size)
    return numbers.float() * spread(scales, block_size, x.shape[-1])


def dequantize(weight: Tensor, scales: Tensor, block_size: int | None) -> Tensor:
    """The matrix `[O, I]` that a weight stands for, float32; scales as `fp8_linear` takes them."""
    by_row = scales if block_size is None else scales.repeat_interleave(block_size, 0)[: weight.shape[0]]
    return weight.float() * spread(by_row.float(), block_size, weight.shape[1])


def _fake(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, block_size: int | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Tensor cores add up products of float8 in fewer bits than float32 has.
@op(tolerance={torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}, fake=_fake, rounds_activations=True)
def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, block_size: int | None) -> Tensor:
    """x · Wᵀ + bias with a weight of float8 numbers, x rounded to such numbers by row or by block of inputs.

    Args:
        x: `[..., I]`.
        weight: float8_e4m3fn `[O, I]`.
        scales: float32 `[O, 1]`, or with blocks `[⌈O/block_size⌉, ⌈I/block_size⌉]`.
        bias: `[O]`.
        block_size: rows and inputs that share a scale; None for whole rows.
    Returns:
        `[..., O]`, summed in float32.
    """
    matrix = dequantize(weight, scales, block_size)
    return F.linear(round_activations(x, block_size), matrix, None if bias is None else bias.float()).to(x.dtype)


@fp8_linear.with_work
def _fp8_linear_work(weight: Tensor, **_: Any) -> Work:
    return Work(flops_per_token=2 * weight.numel())


@fp8_linear.with_samples
def _fp8_linear_samples() -> list[dict[str, Any]]:
    def sample(rows: int, num_inputs: int, num_outputs: int, block_size: int | None, *, bias: bool = False) -> Any:
        blocks = (num_outputs, 1) if block_size is None else (-(-num_outputs // 128), -(-num_inputs // 128))
        return {
            "x": torch.randn(1, rows, num_inputs),
            "weight": (torch.randn(num_outputs, num_inputs) * 100).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8),
            "scales": (torch.rand(blocks) + 0.5) * num_inputs**-0.5 / 100,
            "bias": torch.randn(num_outputs) if bias else None,
            "block_size": block_size,
        }

    return [
        sample(1, 64, 48, None),
        sample(9, 45, 37, None, bias=True),
        sample(17, 144, 80, None, bias=True),
        sample(1, 128, 128, BLOCK_SIZE),
        sample(5, 200, 150, BLOCK_SIZE, bias=True),
        sample(17, 256, 144, BLOCK_SIZE),
        sample(0, 32, 16, None),
    ]
