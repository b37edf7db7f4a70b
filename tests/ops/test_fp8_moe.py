"""fp8_moe against a mixture computed token by token with `fp8_linear` and the meaning of gates."""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops import fp8_linear, fp8_moe
from autodeploy.ops.moe import expert_gate


def _token_by_token(sample: dict[str, Any]) -> Tensor:
    num_experts = sample["num_experts"]

    def product(x: Tensor, name: str, expert: int) -> Tensor:
        weight, scales = (sample[part].chunk(num_experts)[expert] for part in (name, f"{name}_scales"))
        bias = sample[f"{name}_bias"]
        return fp8_linear(x, weight, scales, None if bias is None else bias[expert], sample["block_size"])

    out = torch.zeros_like(sample["x"])
    facts = [sample[name] for name in ("activation", "gated", "limit", "up_offset")]
    for token, x in enumerate(sample["x"]):
        chosen = zip(sample["indices"][token].tolist(), sample["weights"][token].tolist(), strict=True)
        for expert, share in sorted(chosen):
            if expert < num_experts:
                inner = expert_gate(product(x[None], "gate_up", expert), *facts)
                out[token] += share * product(inner, "down", expert)[0]
    return out


def test_is_what_each_token_gives_by_itself() -> None:
    assert fp8_moe.samples is not None
    errors = []
    for sample in fp8_moe.samples():
        errors += (fp8_moe(**sample) - _token_by_token(sample)).abs().amax(-1).tolist()
    # A value on the border of two numbers may go to either, as sums differ in their last bits; few tokens have one.
    assert max(errors) < 5e-2 and sorted(errors)[len(errors) // 2] < 1e-5
