"""nvfp4_moe: grouped products with 4-bit floating point weights of experts."""

from torch import Tensor

from autodeploy.kernels.triton.arithmetic import why_no_activation
from autodeploy.kernels.triton.experts import ExpertWeight, Gate, Routing, multiply_rows, sum_choices
from autodeploy.kernels.triton.float4 import why_not_float4
from autodeploy.kernels.triton.launch import why_refused
from autodeploy.ops.nvfp4_moe import nvfp4_moe


def _supports(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_tensor_scale: Tensor,
    down: Tensor,
    down_scales: Tensor,
    down_tensor_scale: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> str | None:
    reason = why_not_float4(gate_up, gate_up_scales, x.shape[1])
    reason = reason or why_not_float4(down, down_scales, down.shape[1] * 2)
    return reason or why_no_activation(activation) or why_refused(x, gate_up_bias, down_bias)


@nvfp4_moe.kernel("triton", _supports)
def nvfp4_moe_triton(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_tensor_scale: Tensor,
    down: Tensor,
    down_scales: Tensor,
    down_tensor_scale: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> Tensor:
    """`nvfp4_moe` with two grouped products and a sum over choices, in their order."""
    num_tokens, num_choices = indices.shape
    size, width = x.shape[1], down.shape[1] * 2
    indices, weights = indices.contiguous(), weights.contiguous()
    routing, gate = Routing.of(indices, num_experts), Gate(activation, gated, limit, up_offset)
    first = ExpertWeight.float4(gate_up, gate_up_scales, gate_up_tensor_scale, gate_up_bias)
    second = ExpertWeight.float4(down, down_scales, down_tensor_scale, down_bias)
    hidden = multiply_rows(x.contiguous(), routing, first, width, gate, rows_each=num_choices)
    values = multiply_rows(hidden, routing, second, size, rows_each=1)
    return sum_choices(values.view(num_tokens, num_choices, size), indices, weights, num_experts, x.dtype)
