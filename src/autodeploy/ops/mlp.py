"""The elementwise middle of a gated MLP."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import op


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "relu2": _squared_relu,
    "quick_gelu": _quick_gelu,
}
"""Activation functions a gate may use, by name."""


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3})
def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up, with gate and up side by side (arXiv 2002.05202).

    Args:
        gate_up: `[..., 2·I]`, gate first.
        activation: a name in `ACTIVATIONS`.
    Returns:
        `[..., I]`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@gated_activation.with_samples
def _gated_activation_samples() -> list[dict[str, Any]]:
    return [{"gate_up": torch.randn(1, 5, 64), "activation": name} for name in ACTIVATIONS]
