"""fp8_moe: grouped products with float8 weights of experts."""

import torch
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import why_no_activation
from autodeploy.kernels.triton.experts import ExpertWeight, Gate, Routing, multiply_rows, sum_choices
from autodeploy.kernels.triton.float8 import round_to_float8, why_not_float8
from autodeploy.kernels.triton.launch import why_refused
from autodeploy.ops.fp8_moe import fp8_moe


def _supports(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    block_size: int | None,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> str | None:
    reason = why_not_float8(gate_up, gate_up_scales, block_size) or why_not_float8(down, down_scales, block_size)
    return reason or why_no_activation(activation) or why_refused(x, gate_up_bias, down_bias)


@fp8_moe.kernel("triton", _supports)
def fp8_moe_triton(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    block_size: int | None,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> Tensor:
    """`fp8_moe` with two grouped products of float8 numbers and a sum over choices, in their order."""
    num_tokens, num_choices = indices.shape
    size, width = x.shape[1], down.shape[1]
    indices, weights = indices.contiguous(), weights.contiguous()
    routing, gate = Routing.of(indices, num_experts), Gate(activation, gated, limit, up_offset)
    first = ExpertWeight.float8(gate_up, gate_up_scales, block_size, gate_up_bias)
    second = ExpertWeight.float8(down, down_scales, block_size, down_bias)
    # What is rounded to float8, and what is summed, is rounded no other way before.
    rows, scales = round_to_float8(x.contiguous(), block_size)
    hidden = multiply_rows(
        rows, routing, first, width, gate, rows_each=num_choices, x_scales=scales, dtype=torch.float32
    )
    rows, scales = round_to_float8(hidden, block_size)
    values = multiply_rows(rows, routing, second, size, rows_each=1, x_scales=scales, dtype=torch.float32)
    return sum_choices(values.view(num_tokens, num_choices, size), indices, weights, num_experts, x.dtype)
