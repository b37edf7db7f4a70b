"""Normalisations over the last dimension, alone, with the residual sum before them, and with a gate."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.mlp import ACTIVATIONS
from autodeploy.ops.op import op

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@op(tolerance=_TOLERANCE)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + weight_offset), computed in float32 (arXiv 1910.07467).

    Args:
        x: `[..., D]`.
        weight: `[D]`, or None for no scale.
        weight_offset: 0, or 1 where checkpoints store the scale minus one.
        scale_in_float32: apply the scale before rounding to x's dtype; otherwise after.
    """
    normed = x.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if scale_in_float32:
        scale = weight.float() + weight_offset if weight_offset else weight.float()
        return (normed * scale).to(x.dtype)
    scale = weight + weight_offset if weight_offset else weight
    return scale * normed.to(x.dtype)


@op(tolerance=_TOLERANCE)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm: `(rms_norm(x + residual), x + residual)`, both `[..., D]`."""
    total = x + residual
    return rms_norm.reference(total, weight, eps, weight_offset, scale_in_float32), total


@op(tolerance=_TOLERANCE)
def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    groups: int,
    gate_first: bool,
    scale_in_float32: bool,
) -> Tensor:
    """rms_norm(x · activation(gate)), or rms_norm(x) · activation(gate), computed in float32.

    Args:
        x, gate: `[..., D]`. weight: `[D]`, of gate's dtype. x is of that dtype too, or float32.
        activation: a name in `mlp.ACTIVATIONS`.
        groups: D falls into as many equal parts, each with a mean of squares of its own.
        gate_first: the gate acts before the norm, otherwise after.
        scale_in_float32: apply the weight before rounding to x's dtype; otherwise after.
    Returns:
        `[..., D]`, of x's dtype.
    """
    gating: Tensor = ACTIVATIONS[activation](gate.float())
    total = x.float() * gating if gate_first else x.float()
    parts = total.unflatten(-1, (groups, -1))
    normed = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    scaled = weight.float() * normed if scale_in_float32 else weight * normed.to(x.dtype)
    gated: Tensor = scaled if gate_first else scaled * gating
    return gated.to(x.dtype)


@op(tolerance=_TOLERANCE, batch_invariant=True)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dimension (arXiv 1607.06450). x: `[..., D]`."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@rms_norm.with_samples
def _rms_norm_samples() -> list[dict[str, Any]]:
    x, weight = torch.randn(1, 7, 48), torch.randn(48)
    common = {"x": x, "eps": 1e-6}
    return [
        common | {"weight": weight, "weight_offset": 0.0, "scale_in_float32": False},
        common | {"weight": weight, "weight_offset": 1.0, "scale_in_float32": True},
        common | {"weight": None, "weight_offset": 0.0, "scale_in_float32": False},
    ]


@add_rms_norm.with_samples
def _add_rms_norm_samples() -> list[dict[str, Any]]:
    assert rms_norm.samples is not None
    return [sample | {"residual": torch.randn_like(sample["x"])} for sample in rms_norm.samples()]


@gated_rms_norm.with_samples
def _gated_rms_norm_samples() -> list[dict[str, Any]]:
    plain = {"x": torch.randn(1, 7, 48), "gate": torch.randn(1, 7, 48), "weight": torch.randn(48), "eps": 1e-6}
    return [
        plain | {"activation": "silu", "groups": 1, "gate_first": True, "scale_in_float32": False},
        plain | {"activation": "silu", "groups": 3, "gate_first": True, "scale_in_float32": True},
        plain | {"activation": "silu", "groups": 1, "gate_first": False, "scale_in_float32": False},
        plain | {"activation": "sigmoid", "groups": 2, "gate_first": False, "scale_in_float32": True},
    ]


@layer_norm.with_samples
def _layer_norm_samples() -> list[dict[str, Any]]:
    x, weight, bias = torch.randn(1, 7, 48), torch.randn(48), torch.randn(48)
    return [{"x": x, "weight": weight, "bias": bias, "eps": 1e-5}, {"x": x, "weight": None, "bias": None, "eps": 1e-5}]
