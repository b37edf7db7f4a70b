"""A mixture of experts whose weights are 8-bit floating point."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.fp8_linear import BLOCK_SIZE, FLOAT8, dequantize, round_activations
from autodeploy.ops.moe import expert_gate, mix_experts
from autodeploy.ops.op import Work, op


def _fake(
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
    return torch.empty_like(x)


# Between the two products values are rounded again, to 4 bits of precision; one on the border of two numbers may go to
# either, and kernels may differ by such a step of one value.
@op(
    tolerance={torch.float32: 5e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2},
    opaque=True,
    fake=_fake,
    rounds_activations=True,
)
def fp8_moe(
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
    """`moe` with weights as `fp8_linear` has them, the rows of all experts one after another.

    What goes into either product is rounded as there; all else is float32.

    Args:
        x: `[N, H]`.
        indices: int64 `[N, K]`; a choice that is not in 0..E-1 adds nothing.
        weights: `[N, K]`, of x's dtype or float32.
        gate_up: float8_e4m3fn `[E·2·I, H]`, gate first, or `[E·I, H]` where experts have no gate.
        down: float8_e4m3fn `[E·H, I]`.
        gate_up_scales, down_scales: float32, by row or by block; an expert has whole blocks of rows.
        gate_up_bias: `[E, rows]`. down_bias: `[E, H]`.
        num_experts: E.
        block_size: rows and inputs that share a scale; None for whole rows.
        activation, gated, limit, up_offset: as `expert_gate` takes them.
    Returns:
        `[N, H]`.
    """
    rounded = round_activations(x, block_size)

    def matrix(weight: Tensor, scales: Tensor, expert: int) -> Tensor:
        rows, groups = len(weight) // num_experts, len(scales) // num_experts
        own, own_scales = (slice(expert * size, (expert + 1) * size) for size in (rows, groups))
        return dequantize(weight[own], scales[own_scales], block_size)

    def outcome(expert: int, tokens: Tensor) -> Tensor:
        shift = None if gate_up_bias is None else gate_up_bias[expert].float()
        hidden = F.linear(rounded[tokens], matrix(gate_up, gate_up_scales, expert), shift)
        hidden = round_activations(expert_gate(hidden, activation, gated, limit, up_offset), block_size)
        shift = None if down_bias is None else down_bias[expert].float()
        return F.linear(hidden, matrix(down, down_scales, expert), shift)

    return mix_experts(outcome, indices, weights.float(), num_experts, x)


@fp8_moe.with_work
def _fp8_moe_work(indices: Tensor, gate_up: Tensor, down: Tensor, num_experts: int, **_: Any) -> Work:
    share = indices.shape[-1] / num_experts
    return Work(flops_per_token=round(2 * share * (gate_up.numel() + down.numel())), share_of_weights=share)


@fp8_moe.with_samples
def _fp8_moe_samples() -> list[dict[str, Any]]:
    num_experts, num_choices = 4, 2

    def numbers(rows: int, columns: int, block_size: int | None) -> list[Tensor]:
        blocks = (num_experts * rows, 1) if block_size is None else (num_experts * rows // 128, columns // 128)
        scales = (torch.rand(blocks) + 0.5) * columns**-0.5 / 100
        return [(torch.randn(num_experts * rows, columns) * 100).clamp(-448, 448).to(FLOAT8), scales]

    def sample(
        num_tokens: int, block_size: int | None = None, *, gated: bool = True, bias: bool = False, **facts: Any
    ) -> Any:
        hidden, width = (48, 32) if block_size is None else (128, 128)
        rows = 2 * width if gated else width
        return {
            "x": torch.randn(num_tokens, hidden),
            "indices": torch.rand(num_tokens, num_experts).topk(num_choices).indices,
            "weights": torch.rand(num_tokens, num_choices),
            **dict(zip(("gate_up", "gate_up_scales"), numbers(rows, hidden, block_size), strict=True)),
            **dict(zip(("down", "down_scales"), numbers(hidden, width, block_size), strict=True)),
            "gate_up_bias": torch.randn(num_experts, rows) if bias else None,
            "down_bias": torch.randn(num_experts, hidden) if bias else None,
            "num_experts": num_experts,
            "block_size": block_size,
            "activation": "silu",
            "gated": gated,
            "limit": None,
            "up_offset": 0.0,
        } | facts

    nowhere = sample(3)
    nowhere["indices"][1] = torch.tensor([4, 4])
    return [
        sample(1),
        sample(1, BLOCK_SIZE, bias=True),
        sample(19),
        sample(9, BLOCK_SIZE),
        nowhere,
        sample(5, gated=False, activation="relu2"),
        sample(5, bias=True, activation="quick_gelu", limit=1.0, up_offset=1.0),
    ]
