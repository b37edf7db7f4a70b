"""Products with weights of 4-bit floating point in blocks of 16, as NVIDIA stores them (NVFP4).

A number has a sign, 2 bits of exponent and 1 of mantissa; two lie in a byte, that of the earlier input in the lower
half. 16 inputs of a row share a scale, float8_e4m3fn, and all of a weight one more in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.fp8_linear import FLOAT8
from autodeploy.ops.op import Work, op

GROUP_SIZE = 16
"""Inputs that share a scale."""
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by their three bits; the fourth is the sign."""


def unpack(weight: Tensor) -> Tensor:
    """The numbers `[O, I]`, float32, of bytes `[O, I/2]`."""
    codes = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2).int()
    exponents, halves = codes >> 1 & 3, (codes & 1) * 0.5
    magnitudes = torch.where(exponents == 0, halves, torch.ldexp(1 + halves, exponents - 1))
    return torch.where(codes >= 8, -magnitudes, magnitudes)


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """The matrix `[O, I]` that a weight stands for but for the scale of all, float32; 6 bits of a number are enough."""
    return unpack(weight) * scales.float().repeat_interleave(GROUP_SIZE, -1)


def _fake(x: Tensor, weight: Tensor, scales: Tensor, tensor_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@op(tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}, fake=_fake)
def nvfp4_linear(x: Tensor, weight: Tensor, scales: Tensor, tensor_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ · tensor_scale + bias with a weight of 4-bit numbers times the scales of their groups; x is not rounded.

    Args:
        x: `[..., I]`, I a multiple of 16.
        weight: uint8 `[O, I/2]`, two numbers in each.
        scales: float8_e4m3fn `[O, I/16]`.
        tensor_scale: float32 `[1]`.
        bias: `[O]`.
    Returns:
        `[..., O]`, summed in float32.
    """
    product = F.linear(x.float(), dequantize(weight, scales)) * tensor_scale.float()
    return (product if bias is None else product + bias.float()).to(x.dtype)


@nvfp4_linear.with_work
def _nvfp4_linear_work(weight: Tensor, **_: Any) -> Work:
    return Work(flops_per_token=4 * weight.numel())


@nvfp4_linear.with_samples
def _nvfp4_linear_samples() -> list[dict[str, Any]]:
    def sample(rows: int, num_inputs: int, num_outputs: int, *, bias: bool = False) -> dict[str, Any]:
        return {
            "x": torch.randn(1, rows, num_inputs),
            "weight": torch.randint(0, 256, (num_outputs, num_inputs // 2), dtype=torch.uint8),
            "scales": (torch.rand(num_outputs, num_inputs // GROUP_SIZE) * 100).to(FLOAT8),
            "tensor_scale": torch.full((1,), 0.005 * num_inputs**-0.5),
            "bias": torch.randn(num_outputs) if bias else None,
        }

    return [sample(1, 64, 48), sample(9, 48, 37, bias=True), sample(17, 272, 70), sample(0, 32, 16)]
