"""Gated norms are known by their numbers, in every order of gate, weight and rounding; near misses are left alone."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from autodeploy.capture.gated_norms import GatedNormFacts, gated_norms_recognised, probe_gated_norm
from autodeploy.capture.probe import probed


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
