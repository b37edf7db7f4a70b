"""Matrix products with weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import Work, op


@op(tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3})
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias. x: `[..., I]`, weight: `[O, I]`, bias: `[O]`; result `[..., O]`."""
    return F.linear(x, weight, bias)


@linear.with_work
def _linear_work(weight: Tensor, **_: Any) -> Work:
    return Work(flops_per_token=2 * weight.numel())


@linear.with_samples
def _linear_samples() -> list[dict[str, Any]]:
    weight, bias = torch.randn(40, 24), torch.randn(40)
    return [
        {"x": torch.randn(1, 1, 24), "weight": weight, "bias": None},
        {"x": torch.randn(1, 9, 24), "weight": weight, "bias": bias},
    ]
