"""moe and expert_linear: products grouped by expert, with the gate between them in the first one's launch."""

from torch import Tensor

from autodeploy.kernels.triton.arithmetic import why_no_activation
from autodeploy.kernels.triton.experts import ExpertWeight, Gate, Routing, multiply_rows, sum_choices
from autodeploy.kernels.triton.launch import why_refused
from autodeploy.ops.moe import expert_linear, moe


def _supports(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> str | None:
    if 0 in gate_up.shape or 0 in down.shape:
        return f"weights of shapes {tuple(gate_up.shape)} and {tuple(down.shape)}"
    return why_no_activation(activation) or why_refused(x, gate_up, down, gate_up_bias, down_bias)


@moe.kernel("triton", _supports)
def moe_triton(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    limit: float | None,
    up_offset: float,
) -> Tensor:
    """`moe` with two grouped products and a sum over choices, in their order."""
    num_experts, size, width = down.shape
    num_tokens, num_choices = indices.shape
    indices, weights = indices.contiguous(), weights.contiguous()
    routing = Routing.of(indices, num_experts)
    gate = Gate(activation, gated, limit, up_offset)
    first, second = ExpertWeight.plain(gate_up, gate_up_bias), ExpertWeight.plain(down, down_bias)
    hidden = multiply_rows(x.contiguous(), routing, first, width, gate, rows_each=num_choices)
    values = multiply_rows(hidden, routing, second, size, rows_each=1)
    return sum_choices(values.view(num_tokens, num_choices, size), indices, weights, num_experts, x.dtype)


def _linear_supports(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if 0 in weight.shape:
        return f"a weight of shape {tuple(weight.shape)}"
    return why_refused(x, weight, bias)


@expert_linear.kernel("triton", _linear_supports)
def expert_linear_triton(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`expert_linear` as one grouped product."""
    num_experts, num_outputs, num_inputs = weight.shape
    num_tokens, num_choices = indices.shape
    routing = Routing.of(indices, num_experts)
    own = ExpertWeight.plain(weight, bias)
    rows = x.reshape(-1, num_inputs)
    out = multiply_rows(rows, routing, own, num_outputs, rows_each=num_choices // x.shape[1])
    is_expert = (indices >= 0) & (indices < num_experts)
    return out.view(num_tokens, num_choices, num_outputs).masked_fill_(~is_expert[:, :, None], 0.0)
