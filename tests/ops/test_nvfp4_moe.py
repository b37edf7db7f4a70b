"""nvfp4_moe against a mixture computed token by token with `nvfp4_linear` and the meaning of gates."""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops import nvfp4_linear, nvfp4_moe
from autodeploy.ops.moe import expert_gate


def _token_by_token(sample: dict[str, Any]) -> Tensor:
    num_experts = sample["num_experts"]

    def product(x: Tensor, name: str, expert: int) -> Tensor:
        weight, scales = (sample[part].chunk(num_experts)[expert] for part in (name, f"{name}_scales"))
        bias = sample[f"{name}_bias"]
        shift = None if bias is None else bias[expert]
        return nvfp4_linear(x, weight, scales, sample[f"{name}_tensor_scale"], shift)

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
    assert nvfp4_moe.samples is not None
    for sample in nvfp4_moe.samples():
        torch.testing.assert_close(nvfp4_moe(**sample), _token_by_token(sample), rtol=1e-4, atol=1e-4)
