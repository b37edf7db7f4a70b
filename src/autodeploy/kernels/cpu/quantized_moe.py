"""quantized_moe for any number of tokens: the tiles of each chosen expert are read once, for all its tokens."""

import math

import torch
from torch import Tensor

from autodeploy.kernels.cpu.mlp import ACTIVATION_NUMBERS
from autodeploy.kernels.cpu.native import (
    FLOAT,
    INT,
    INT64,
    MIN_WEIGHTS_FOR_THREADS,
    POINTER,
    THREADS,
    NativeFunction,
    num_threads,
    pointer,
    why_refused,
)
from autodeploy.kernels.cpu.quantized_linear import BLOCK_BYTES, PANEL, why_not_packed
from autodeploy.ops.quantized_linear import BLOCK, TILE
from autodeploy.ops.quantized_moe import quantized_moe

_quantized_moe = NativeFunction(
    "quantized_moe", (*[POINTER] * 12, *[INT64] * 9, INT, INT, FLOAT, FLOAT, THREADS, *[POINTER] * 7)
)


def _supports(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_offsets: Tensor | None,
    down: Tensor,
    down_scales: Tensor,
    down_offsets: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> str | None:
    if activation not in ACTIVATION_NUMBERS:
        return f"activation {activation!r}; there are kernels for {', '.join(ACTIVATION_NUMBERS)}"
    reason = why_not_packed(gate_up, gate_up_scales, gate_up_offsets)
    reason = reason or why_not_packed(down, down_scales, down_offsets)
    if down.shape[0] * TILE != num_experts * x.shape[-1]:
        return f"{x.shape[-1]} inputs, which are no whole tiles of {TILE}"
    return reason or why_refused(x, gate_up_bias, down_bias)


@quantized_moe.kernel("cpu", _supports)
def quantized_moe_cpu(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_offsets: Tensor | None,
    down: Tensor,
    down_scales: Tensor,
    down_offsets: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> Tensor:
    """`quantized_moe` with sums of whole numbers in each block of inputs."""
    (num_tokens, num_choices), size = indices.shape, x.shape[1]
    choices, rows = num_tokens * num_choices, gate_up.shape[0] * TILE // num_experts
    width = rows // 2 if gated else rows
    parts = (gate_up, gate_up_scales, gate_up_offsets, down, down_scales, down_offsets, gate_up_bias, down_bias)
    given = [None if part is None else part.contiguous() for part in parts]
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.float().contiguous()
    out = torch.empty_like(x)
    panels = -(-choices // PANEL) + min(choices, num_experts)
    scratch = (
        indices.new_empty(choices),
        indices.new_empty(choices + 1),
        indices.new_empty(choices),
        *(x.new_empty(panels * PANEL * -(-n // BLOCK) * BLOCK_BYTES, dtype=torch.uint8) for n in (size, width)),
        x.new_empty(choices * rows, dtype=torch.float32),
        x.new_empty(num_tokens * size, dtype=torch.float32),
    )
    _quantized_moe[x.dtype](
        *(tensor.data_ptr() for tensor in (x, indices, weights)),
        *map(pointer, given),
        out.data_ptr(),
        num_tokens,
        num_choices,
        num_experts,
        size,
        width,
        gate_up.shape[2],
        gate_up_scales.shape[1],
        down.shape[2],
        down_scales.shape[1],
        ACTIVATION_NUMBERS[activation],
        int(gated),
        math.inf if limit is None else limit,
        up_offset,
        num_threads(size * width, MIN_WEIGHTS_FOR_THREADS),
        *(tensor.data_ptr() for tensor in scratch),
    )
    return out
