"""moe for any number of tokens per expert: bound by reading the chosen experts, once, or by multiplying."""

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
from autodeploy.ops.moe import moe

_moe = NativeFunction("moe", (*[POINTER] * 8, *[INT64] * 5, INT, INT, FLOAT, FLOAT, THREADS, *[POINTER] * 5))


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
    if activation not in ACTIVATION_NUMBERS:
        return f"activation {activation!r}; there are kernels for {', '.join(ACTIVATION_NUMBERS)}"
    if 0 in gate_up.shape or 0 in down.shape:
        return f"weights of shapes {tuple(gate_up.shape)} and {tuple(down.shape)}"
    return why_refused(x, gate_up, down, gate_up_bias, down_bias)


@moe.kernel("cpu", _supports)
def moe_cpu(
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
    """`moe` with the weights of each chosen expert read once; products and gates are float32."""
    num_tokens, num_choices = indices.shape
    num_experts, size, width = down.shape
    choices = num_tokens * num_choices
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        result: Tensor = moe.reference(
            x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, gated, limit, up_offset
        )
        return result
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.float().contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in (gate_up_bias, down_bias)]
    out = torch.empty_like(x)
    scratch = (
        indices.new_empty(choices),
        indices.new_empty(choices + 1),
        x.new_empty(choices * gate_up.shape[1], dtype=torch.float32),
        x.new_empty(choices * width, dtype=torch.float32),
        x.new_empty(num_tokens * size, dtype=torch.float32),
    )
    _moe[x.dtype](
        *(tensor.data_ptr() for tensor in (x, indices, weights, gate_up, down)),
        *map(pointer, biases),
        out.data_ptr(),
        num_tokens,
        num_choices,
        num_experts,
        size,
        width,
        ACTIVATION_NUMBERS[activation],
        int(gated),
        math.inf if limit is None else limit,
        up_offset,
        num_threads(size * width, MIN_WEIGHTS_FOR_THREADS),
        *(tensor.data_ptr() for tensor in scratch),
    )
    return out
