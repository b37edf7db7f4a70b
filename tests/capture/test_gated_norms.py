"""Gated norms are known by their numbers, in every order of gate, weight and rounding; near misses are left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from autodeploy.capture.gated_norms import GatedNormFacts, gated_norms_recognised, probe_gated_norm, takes_float32
from autodeploy.capture.probe import probed
from autodeploy.ops import gated_rms_norm


@pytest.mark.parametrize(
    ("norm", "facts"),
    [
        (BambaRMSNormGated(48, group_size=48), GatedNormFacts(1e-6, "silu", 1, True, False)),
        (BambaRMSNormGated(48, group_size=16, eps=1e-5), GatedNormFacts(1e-5, "silu", 3, True, False)),
        (Qwen3NextRMSNormGated(48), GatedNormFacts(1e-6, "silu", 1, False, False)),
        (KimiLinearRMSNormGated(48), GatedNormFacts(1e-6, "sigmoid", 1, False, True)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_by_numbers(norm: nn.Module, facts: GatedNormFacts) -> None:
    assert probe_gated_norm(norm) == facts
    assert probe_gated_norm(norm.to("meta")) == facts


def test_float32_beside_a_gate_of_bfloat16_is_read_as_it_is() -> None:
    norm = BambaRMSNormGated(48, group_size=16).bfloat16()
    torch.manual_seed(0)
    x, gate = torch.randn(1, 3, 48), torch.randn(1, 3, 48).bfloat16()
    expected, narrow = norm(x, gate), norm(x.bfloat16(), gate)
    with gated_norms_recognised(norm) as found, _Calls() as calls:
        assert found == 1 and norm(x, gate).dtype == torch.float32
        torch.testing.assert_close(norm(x, gate), expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(norm(x.bfloat16(), gate), narrow)
        assert calls.count == 3
        assert torch.equal(norm(x.half(), gate), BambaRMSNormGated.forward(norm, x.half(), gate))
        assert calls.count == 3


class _Calls(TorchDispatchMode):
    """Counts calls of the op."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function == gated_rms_norm.overload
        return function(*args, **kwargs or {})


class _RoundedByWeight(BambaRMSNormGated):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states, gate).to(self.weight.dtype)


def test_float32_is_left_to_a_norm_that_gives_another_dtype_for_it() -> None:
    norm = _RoundedByWeight(48, group_size=48)
    facts = probe_gated_norm(norm)
    assert facts is not None and not takes_float32(norm, facts)
    norm = norm.bfloat16()
    x, gate = torch.randn(1, 3, 48), torch.randn(1, 3, 48).bfloat16()
    with gated_norms_recognised(norm), _Calls() as calls:
        assert norm(x, gate).dtype == torch.bfloat16 and calls.count == 0


class _NormOfSum(BambaRMSNormGated):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states + (0 if gate is None else gate))


class _Scale(nn.Module):
    """A second tensor, one weight, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(48)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * torch.sigmoid(gate)


@pytest.mark.parametrize("norm", [_NormOfSum(48, group_size=48), _Scale()], ids=lambda norm: type(norm).__name__)
def test_near_misses_are_left_alone(norm: nn.Module) -> None:
    assert probe_gated_norm(norm) is None
    with gated_norms_recognised(norm) as found:
        assert found == 0


@pytest.mark.parametrize("before_gate", [True, False])
def test_the_op_stands_in_only_where_both_tensors_are_alike(before_gate: bool) -> None:
    norm = FalconH1RMSNormGated(48, n_groups=2, norm_before_gate=before_gate)
    x, gate = torch.randn(1, 3, 48), torch.randn(1, 3, 48)
    expected, alone = norm(x, gate), norm(x)
    with probed(norm), gated_norms_recognised(norm) as found:
        assert found == 1
        torch.testing.assert_close(norm(x, gate), expected)
        torch.testing.assert_close(norm(x, gate=gate), expected)
        torch.testing.assert_close(norm(x), alone)
        torch.testing.assert_close(norm(x, gate[:, :1]), FalconH1RMSNormGated.forward(norm, x, gate[:, :1]))
    assert "forward" not in vars(norm)


def test_a_norm_that_is_one_with_and_without_a_gate_is_recognised_as_both() -> None:
    norm = BambaRMSNormGated(48, group_size=48).to("meta")
    with probed(norm) as plain, gated_norms_recognised(norm) as gated:
        assert (plain, gated) == (1, 1)
