"""Experts: products with the weight that a router chose for a token, and the whole feed-forward mixture of them."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.mlp import ACTIVATIONS
from autodeploy.ops.op import Work, op

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def expert_gate(hidden: Tensor, activation: str, gated: bool, limit: float | None, up_offset: float) -> Tensor:
    """What stands between an expert's two products.

    Args:
        hidden: `[..., 2·I]` with the gate first, or `[..., I]` where experts have no gate.
        activation: a name in `ACTIVATIONS`.
        gated: activation(gate) · (up + up_offset), else activation(hidden).
        limit: of a gate, the largest value; of up, the largest magnitude; before anything else.
    Returns:
        `[..., I]`.
    """
    function = ACTIVATIONS[activation]
    if not gated:
        return function(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return function(gate) * (up + up_offset if up_offset else up)


def choices(indices: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that was chosen, with the positions of its choices in `indices` laid out flat."""
    experts, order = indices.reshape(-1).sort(stable=True)
    borders = torch.searchsorted(experts, torch.arange(num_experts + 1, device=experts.device)).tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(borders)):
        if end > start:
            yield expert, order[start:end]


def mix_experts(
    outcome: Callable[[int, Tensor], Tensor], indices: Tensor, weights: Tensor, num_experts: int, x: Tensor
) -> Tensor:
    """Σₖ weights[k] · outcome(indices[k]) of each token, in float32 and in the order of the experts; x's dtype.

    Args:
        outcome: of an expert and the numbers of the tokens that chose it, its results `[tokens, H]`.
        indices, weights: `[N, K]`. x: `[N, H]`.
    """
    flat_weights = weights.reshape(-1, 1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, positions in choices(indices, num_experts):
        tokens = positions // indices.shape[1]
        out.index_add_(0, tokens, (outcome(expert, tokens) * flat_weights[positions]).float())
    return out.to(x.dtype)


def _expert_linear_fake(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*indices.shape, weight.shape[1])


@op(tolerance=_TOLERANCE, opaque=True, fake=_expert_linear_fake)
def expert_linear(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weight[e]ᵀ + bias[e], for each choice e of each token.

    Args:
        x: `[N, K, I]`, or `[N, 1, I]` where all choices of a token read the same row.
        indices: int64 `[N, K]`; a choice that is not in 0..E-1 gives zeros.
        weight: `[E, O, I]`. bias: `[E, O]`.
    Returns:
        `[N, K, O]`.
    """
    num_tokens, num_choices = indices.shape
    rows = x.reshape(-1, x.shape[-1])
    rows_each = num_choices // x.shape[1]
    out = x.new_zeros(num_tokens * num_choices, weight.shape[1])
    for expert, positions in choices(indices, weight.shape[0]):
        shift = None if bias is None else bias[expert]
        out[positions] = F.linear(rows[positions // rows_each], weight[expert], shift)
    return out.view(num_tokens, num_choices, -1)


def _moe_fake(
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
    return torch.empty_like(x)


@op(tolerance=_TOLERANCE, opaque=True, fake=_moe_fake)
def moe(
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
    """Σₖ weights[k] · (down[e] · expert_gate(gate_up[e] · x + gate_up_bias[e]) + down_bias[e]), e = indices[k].

    Tokens are grouped by expert (arXiv 1701.06538, 2211.15841): one product per expert that has tokens. A token's sum
    is taken in float32 and in the order of the experts, so that it does not depend on the other tokens.

    Args:
        x: `[N, H]`.
        indices: int64 `[N, K]`; a choice that is not in 0..E-1 adds nothing.
        weights: `[N, K]`, of x's dtype or float32.
        gate_up: `[E, 2·I, H]`, gate first, or `[E, I, H]` where experts have no gate. gate_up_bias: `[E, 2·I]`.
        down: `[E, H, I]`. down_bias: `[E, H]`.
        activation, gated, limit, up_offset: as `expert_gate` takes them.
    Returns:
        `[N, H]`.
    """

    def outcome(expert: int, tokens: Tensor) -> Tensor:
        hidden = F.linear(x[tokens], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        hidden = expert_gate(hidden, activation, gated, limit, up_offset)
        return F.linear(hidden, down[expert], None if down_bias is None else down_bias[expert])

    return mix_experts(outcome, indices, weights, down.shape[0], x)


@expert_linear.with_work
def _expert_linear_work(indices: Tensor, weight: Tensor, **_: Any) -> Work:
    return _chosen(indices, weight)


@moe.with_work
def _moe_work(indices: Tensor, gate_up: Tensor, down: Tensor, **_: Any) -> Work:
    return _chosen(indices, gate_up, down)


def _chosen(indices: Tensor, *weights: Tensor) -> Work:
    """Each token multiplies with the weights of as many experts as it has choices."""
    share = indices.shape[-1] / weights[0].shape[0]
    return Work(flops_per_token=round(2 * share * sum(w.numel() for w in weights)), share_of_weights=share)


@expert_linear.with_samples
def _expert_linear_samples() -> list[dict[str, Any]]:
    weight, bias = torch.randn(5, 24, 16) / 4, torch.randn(5, 24)
    return [
        {"x": torch.randn(7, 1, 16), "indices": torch.randint(0, 5, (7, 2)), "weight": weight, "bias": None},
        {"x": torch.randn(1, 3, 16), "indices": torch.tensor([[4, 0, 5]]), "weight": weight, "bias": bias},
    ]


@moe.with_samples
def _moe_samples() -> list[dict[str, Any]]:
    def sample(num_tokens: int, *, gated: bool = True, bias: bool = False, width: int = 40, **facts: Any) -> Any:
        num_experts, num_choices, hidden = 6, 2, 48
        rows = 2 * width if gated else width
        return {
            "x": torch.randn(num_tokens, hidden),
            "indices": torch.rand(num_tokens, num_experts).topk(num_choices).indices,
            "weights": torch.rand(num_tokens, num_choices),
            "gate_up": torch.randn(num_experts, rows, hidden) * hidden**-0.5,
            "down": torch.randn(num_experts, hidden, width) * width**-0.5,
            "gate_up_bias": torch.randn(num_experts, rows) if bias else None,
            "down_bias": torch.randn(num_experts, hidden) if bias else None,
            "activation": "silu",
            "gated": gated,
            "limit": None,
            "up_offset": 0.0,
        } | facts

    nowhere = sample(3, width=17)
    nowhere["indices"][1] = torch.tensor([6, 6])
    return [
        sample(1),
        sample(37),
        nowhere,
        sample(5, gated=False, activation="relu2"),
        sample(5, bias=True, activation="quick_gelu", limit=1.0, up_offset=1.0),
        *(sample(2, activation=name) for name in ACTIVATIONS),
    ]
