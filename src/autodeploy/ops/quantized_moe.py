"""A mixture of experts whose weights have 8 or 4 bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.mlp import ACTIVATIONS
from autodeploy.ops.moe import expert_gate, mix_experts
from autodeploy.ops.op import Work, op
from autodeploy.ops.quantized_linear import TILE, dequantize, pack, round_activations


def _fake(
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
    return torch.empty_like(x)


# Between the two products values are rounded again; one on the border of two levels may go to either, and kernels may
# differ by such a step of one value.
@op(
    tolerance={torch.float32: 3e-2, torch.bfloat16: 3e-2, torch.float16: 3e-2},
    opaque=True,
    fake=_fake,
    rounds_activations=True,
)
def quantized_moe(
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
    """`moe` with weights as `quantized_linear` has them, the tiles of all experts one after another.

    What goes into either product is rounded as there; all else is float32.

    Args:
        x: `[N, H]`, H a multiple of 16.
        indices: int64 `[N, K]`; a choice that is not in 0..E-1 adds nothing.
        weights: `[N, K]`, of x's dtype or float32.
        gate_up: uint8, of 2·I rows, gate first, or of I rows where experts have no gate; a multiple of 16 of them.
        down: uint8, of H rows.
        gate_up_scales, gate_up_offsets, down_scales, down_offsets: float16, by tile and group.
        gate_up_bias: `[E, rows]`. down_bias: `[E, H]`.
        num_experts: E.
        activation, gated, limit, up_offset: as `expert_gate` takes them.
    Returns:
        `[N, H]`.
    """
    rounded = round_activations(x)

    def matrix(packed: Tensor, scales: Tensor, offsets: Tensor | None, size: int, expert: int) -> Tensor:
        tiles = len(packed) // num_experts
        own = slice(expert * tiles, (expert + 1) * tiles)
        return dequantize(packed[own], scales[own], None if offsets is None else offsets[own], tiles * TILE, size)

    def outcome(expert: int, tokens: Tensor) -> Tensor:
        up = matrix(gate_up, gate_up_scales, gate_up_offsets, x.shape[1], expert)
        hidden = F.linear(rounded[tokens], up, None if gate_up_bias is None else gate_up_bias[expert].float())
        hidden = expert_gate(hidden, activation, gated, limit, up_offset)
        back = matrix(down, down_scales, down_offsets, hidden.shape[1], expert)
        return F.linear(round_activations(hidden), back, None if down_bias is None else down_bias[expert].float())

    return mix_experts(outcome, indices, weights.float(), num_experts, x)


@quantized_moe.with_work
def _quantized_moe_work(indices: Tensor, gate_up: Tensor, down: Tensor, num_experts: int, **_: Any) -> Work:
    share = indices.shape[-1] / num_experts
    num_weights = sum(packed.numel() * 8 // packed.shape[2] for packed in (gate_up, down))
    return Work(flops_per_token=round(2 * share * num_weights), share_of_weights=share)


@quantized_moe.with_samples
def _quantized_moe_samples() -> list[dict[str, Any]]:
    num_experts, num_choices, hidden, width = 6, 2, 64, 96

    def quantized(rows: int, columns: int, bits: int, groups: int, *, offsets: bool) -> list[Tensor | None]:
        numbers = torch.randint(0, 2**bits, (num_experts * rows, columns), dtype=torch.uint8)
        shape = (num_experts * rows // TILE, groups, TILE)
        scales = ((torch.rand(shape) + 0.5) * columns**-0.5 * 2.0 ** (2 - bits)).half()
        return [pack(numbers, bits), scales, (torch.randn(shape) * columns**-0.5).half() if offsets else None]

    def sample(num_tokens: int, bits: int, *, gated: bool = True, rich: bool = False, **facts: Any) -> Any:
        rows = 2 * width if gated else width
        up = quantized(rows, hidden, bits, 2 if rich else 1, offsets=rich)
        down = quantized(hidden, width, bits, 3 if rich else 1, offsets=rich)
        return {
            "x": torch.randn(num_tokens, hidden),
            "indices": torch.rand(num_tokens, num_experts).topk(num_choices).indices,
            "weights": torch.rand(num_tokens, num_choices),
            **dict(zip(("gate_up", "gate_up_scales", "gate_up_offsets"), up, strict=True)),
            **dict(zip(("down", "down_scales", "down_offsets"), down, strict=True)),
            "gate_up_bias": torch.randn(num_experts, rows) if rich else None,
            "down_bias": torch.randn(num_experts, hidden) if rich else None,
            "num_experts": num_experts,
            "activation": "silu",
            "gated": gated,
            "limit": None,
            "up_offset": 0.0,
        } | facts

    nowhere = sample(3, 8)
    nowhere["indices"][1] = torch.tensor([6, 6])
    return [
        sample(1, 8),
        sample(1, 4, rich=True),
        sample(37, 8),
        sample(70, 4, rich=True),
        nowhere,
        sample(5, 4, gated=False, activation="relu2"),
        sample(5, 8, rich=True, activation="quick_gelu", limit=1.0, up_offset=1.0),
        *(sample(2, 8, activation=name) for name in ACTIVATIONS),
    ]
