"""quantized_moe against a mixture computed token by token with `quantized_linear` and the meaning of gates."""

import torch
from torch import Tensor

from autodeploy.ops import quantized_linear, quantized_moe
from autodeploy.ops.moe import expert_gate


def _token_by_token(sample: dict[str, Tensor]) -> Tensor:
    num_experts, hidden = int(sample["num_experts"]), sample["x"].shape[1]

    def product(x: Tensor, name: str, expert: int) -> Tensor:
        tiles = len(sample[name]) // num_experts
        own = slice(expert * tiles, (expert + 1) * tiles)
        parts = [sample[part] for part in (name, f"{name}_scales", f"{name}_offsets", f"{name}_bias")]
        weight, scales, offsets, bias = (None if part is None else part for part in parts)
        return quantized_linear(
            x,
            weight[own],
            scales[own],
            None if offsets is None else offsets[own],
            None if bias is None else bias[expert],
            tiles * 16,
        )

    out = torch.zeros(len(sample["x"]), hidden)
    facts = [sample[name] for name in ("activation", "gated", "limit", "up_offset")]
    for token, x in enumerate(sample["x"]):
        chosen = zip(sample["indices"][token].tolist(), sample["weights"][token].tolist(), strict=True)
        for expert, share in sorted(chosen):
            if expert < num_experts:
                inner = expert_gate(product(x[None], "gate_up", expert), *facts)  # type: ignore[arg-type]
                out[token] += share * product(inner, "down", expert)[0]
    return out


def test_is_what_each_token_gives_by_itself() -> None:
    assert quantized_moe.samples is not None
    errors = []
    for sample in quantized_moe.samples():
        errors += (quantized_moe(**sample) - _token_by_token(sample)).abs().amax(-1).tolist()
    # A value on the border of two levels may go to either, as sums differ in their last bits; few tokens have one.
    assert max(errors) < 3e-2 and sorted(errors)[len(errors) // 2] < 1e-5
