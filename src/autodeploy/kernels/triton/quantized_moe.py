"""quantized_moe: grouped products with packed weights of experts."""

import torch
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import why_no_activation
from autodeploy.kernels.triton.experts import ExpertWeight, Gate, Routing, multiply_rows, sum_choices
from autodeploy.kernels.triton.launch import why_refused
from autodeploy.kernels.triton.packed_weights import round_rows, why_not_packed
from autodeploy.ops.quantized_linear import TILE
from autodeploy.ops.quantized_moe import quantized_moe


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
    reason = why_not_packed(gate_up, gate_up_scales, gate_up_offsets)
    reason = reason or why_not_packed(down, down_scales, down_offsets)
    if reason is not None:
        return reason
    size, width = x.shape[-1], _width(gate_up, num_experts, gated)
    if down.shape[0] * TILE != num_experts * size or width % TILE:
        return f"{size} inputs and {width} inner ones, which are no whole tiles of {TILE}"
    return why_no_activation(activation) or why_refused(x, gate_up_bias, down_bias)


def _width(gate_up: Tensor, num_experts: int, gated: bool) -> int:
    rows = int(gate_up.shape[0]) * TILE // num_experts
    return rows // 2 if gated else rows


@quantized_moe.kernel("triton", _supports)
def quantized_moe_triton(
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
    indices, weights = indices.contiguous(), weights.contiguous()
    routing, gate = Routing.of(indices, num_experts), Gate(activation, gated, limit, up_offset)
    first = ExpertWeight.packed(gate_up, gate_up_scales, gate_up_offsets, gate_up_bias)
    second = ExpertWeight.packed(down, down_scales, down_offsets, down_bias)
    width = _width(gate_up, num_experts, gated)
    # What is rounded to levels, and what is summed, is rounded no other way before.
    rows, scales = round_rows(x.contiguous(), first.bits)
    hidden = multiply_rows(
        rows, routing, first, width, gate, rows_each=num_choices, x_scales=scales, dtype=torch.float32
    )
    rows, scales = round_rows(hidden, second.bits)
    values = multiply_rows(rows, routing, second, size, rows_each=1, x_scales=scales, dtype=torch.float32)
    return sum_choices(values.view(num_tokens, num_choices, size), indices, weights, num_experts, x.dtype)
