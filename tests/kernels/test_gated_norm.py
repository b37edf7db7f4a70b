"""Gated norms of float32 beside a gate and a weight of another dtype, by every kernel; other mixtures are refused."""

from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import Kernel, gated_rms_norm

PRIORITIES = [provider.priority(torch.device(device)) for device in ("cpu", "cuda")]
KERNELS = [kernel for name, kernel in gated_rms_norm.kernels.items() if any(name in names for names in PRIORITIES)]


def _arguments(x_dtype: torch.dtype, dtype: torch.dtype, **facts: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    gate, weight = torch.randn(1, 5, 48).to(dtype), torch.randn(48).to(dtype)
    common = {"eps": 1e-6, "activation": "silu", "groups": 3, "gate_first": True, "scale_in_float32": False}
    return {"x": torch.randn(1, 5, 48).to(x_dtype), "gate": gate, "weight": weight} | common | facts


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("scale_in_float32", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.provider)
def test_float32_stays_float32(kernel: Kernel, scale_in_float32: bool, gate_first: bool) -> None:
    facts = {"scale_in_float32": scale_in_float32, "gate_first": gate_first}
    arguments = _arguments(torch.float32, torch.bfloat16, **facts)
    assert kernel.supports(**arguments) is None
    expected = gated_rms_norm.reference(**arguments)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(kernel.function(**arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.provider)
def test_other_mixtures_are_refused(kernel: Kernel) -> None:
    assert "bfloat16" in (kernel.supports(**_arguments(torch.bfloat16, torch.float32)) or "")
    arguments = _arguments(torch.float32, torch.bfloat16)
    assert "float32" in (kernel.supports(**arguments | {"weight": arguments["weight"].float()}) or "")
