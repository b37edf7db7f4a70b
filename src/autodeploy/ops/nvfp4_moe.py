"""A mixture of experts whose weights are 4-bit floating point, as `nvfp4_linear` has them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.fp8_linear import FLOAT8
from autodeploy.ops.moe import expert_gate, mix_experts
from autodeploy.ops.nvfp4_linear import GROUP_SIZE, dequantize
from autodeploy.ops.op import Work, op


def _fake(
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
    return torch.empty_like(x)


@op(tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}, opaque=True, fake=_fake)
def nvfp4_moe(
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
    """`moe` with weights of 4-bit numbers times the scales of their groups, the rows of all experts one after another.

    What goes into a product is of x's dtype; sums and gates are float32.

    Args:
        x: `[N, H]`, H and I multiples of 16.
        indices: int64 `[N, K]`; a choice that is not in 0..E-1 adds nothing.
        weights: `[N, K]`, of x's dtype or float32.
        gate_up: uint8 `[E·2·I, H/2]`, gate first, or `[E·I, H/2]` where experts have no gate.
        down: uint8 `[E·H, I/2]`.
        gate_up_scales, down_scales: float8_e4m3fn, one for 16 inputs of a row.
        gate_up_tensor_scale, down_tensor_scale: float32 `[1]`, one for all experts.
        gate_up_bias: `[E, rows]`. down_bias: `[E, H]`.
        num_experts: E.
        activation, gated, limit, up_offset: as `expert_gate` takes them.
    Returns:
        `[N, H]`.
    """

    def product(
        rows: Tensor, weight: Tensor, scales: Tensor, scale: Tensor, bias: Tensor | None, expert: int
    ) -> Tensor:
        size = len(weight) // num_experts
        own = slice(expert * size, (expert + 1) * size)
        sums = F.linear(rows.float(), dequantize(weight[own], scales[own])) * scale
        return sums if bias is None else sums + bias[expert].float()

    def outcome(expert: int, tokens: Tensor) -> Tensor:
        hidden = product(x[tokens], gate_up, gate_up_scales, gate_up_tensor_scale, gate_up_bias, expert)
        hidden = expert_gate(hidden, activation, gated, limit, up_offset).to(x.dtype)
        return product(hidden, down, down_scales, down_tensor_scale, down_bias, expert)

    return mix_experts(outcome, indices, weights.float(), num_experts, x)


@nvfp4_moe.with_work
def _nvfp4_moe_work(indices: Tensor, gate_up: Tensor, down: Tensor, num_experts: int, **_: Any) -> Work:
    share = indices.shape[-1] / num_experts
    return Work(flops_per_token=round(4 * share * (gate_up.numel() + down.numel())), share_of_weights=share)


@nvfp4_moe.with_samples
def _nvfp4_moe_samples() -> list[dict[str, Any]]:
    num_experts, num_choices, hidden, width = 4, 2, 48, 32

    def numbers(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {
            name: torch.randint(0, 256, (num_experts * rows, columns // 2), dtype=torch.uint8),
            f"{name}_scales": (torch.rand(num_experts * rows, columns // GROUP_SIZE) * 100).to(FLOAT8),
            f"{name}_tensor_scale": torch.full((1,), 0.005 * columns**-0.5),
        }

    def sample(num_tokens: int, *, gated: bool = True, bias: bool = False, **facts: Any) -> dict[str, Any]:
        rows = 2 * width if gated else width
        return {
            "x": torch.randn(num_tokens, hidden),
            "indices": torch.rand(num_tokens, num_experts).topk(num_choices).indices,
            "weights": torch.rand(num_tokens, num_choices),
            **numbers("gate_up", rows, hidden),
            **numbers("down", hidden, width),
            "gate_up_bias": torch.randn(num_experts, rows) if bias else None,
            "down_bias": torch.randn(num_experts, hidden) if bias else None,
            "num_experts": num_experts,
            "activation": "silu",
            "gated": gated,
            "limit": None,
            "up_offset": 0.0,
        } | facts

    nowhere = sample(3)
    nowhere["indices"][1] = torch.tensor([4, 4])
    return [
        sample(1),
        sample(19),
        nowhere,
        sample(5, gated=False, activation="relu2"),
        sample(5, bias=True, activation="quick_gelu", limit=1.0, up_offset=1.0),
    ]
