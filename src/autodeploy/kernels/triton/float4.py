"""Weights of 4-bit floating point as tiles in registers.

A number times its scale has 6 significant bits, which bfloat16 and float16 hold; the scale of the whole weight goes to
the sums. Both kinds of numbers are decoded by their bits, which a float16 has room for, so that no device needs to know
them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.ops.fp8_linear import FLOAT8
from autodeploy.ops.nvfp4_linear import GROUP_SIZE


@triton.jit
def _decoded(codes):
    """4-bit codes as float32 numbers times 2^-14: sign, exponent and mantissa where a float16 has them."""
    bits = ((codes & 8).to(tl.int16) << 12) | ((codes & 7).to(tl.int16) << 9)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def float4_tile(weight, scales, columns, start, num_inputs, INPUTS: tl.constexpr, EVEN: tl.constexpr):
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


def why_not_float4(weight: Tensor, scales: Tensor, num_inputs: int) -> str | None:
    """The reason that these are no weight of 4-bit numbers for so many inputs that there are kernels for, or None."""
    if weight.dtype != torch.uint8 or scales.dtype != FLOAT8 or 0 in weight.shape:
        return (
            f"a weight {weight.dtype} {tuple(weight.shape)} with scales {scales.dtype}; it must be uint8, float8_e4m3fn"
        )
    return f"{num_inputs} inputs, no multiple of {GROUP_SIZE}" if num_inputs % GROUP_SIZE else None
