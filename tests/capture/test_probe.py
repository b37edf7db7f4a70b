"""Probes: norms and rotary functions are known by their numbers; what merely looks like one is left alone."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved_rotary
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5LayerNorm

from autodeploy.capture.probe import NormFacts, probe_norm, probe_rotary, probed


@pytest.mark.parametrize(
    ("norm", "facts"),
    [
        (LlamaRMSNorm(48, eps=1e-5), NormFacts(1e-5, 0.0, False)),
        (Gemma3RMSNorm(48, eps=1e-6), NormFacts(1e-6, 1.0, True)),
        (T5LayerNorm(48, eps=1e-6), NormFacts(1e-6, 0.0, False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_by_numbers(norm: nn.Module, facts: NormFacts) -> None:
    assert probe_norm(norm) == facts
    assert probe_norm(norm.to("meta")) == facts, "a module without storage is probed all the same"


class _MeanNorm(nn.Module):
    """Subtracts the mean: no RMSNorm, though it looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(48)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Doubled(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize("norm", [_MeanNorm(), _Doubled(48)], ids=lambda norm: type(norm).__name__)
def test_near_misses_are_left_alone(norm: nn.Module) -> None:
    assert probe_norm(norm) is None


def test_rotary_by_numbers() -> None:
    assert probe_rotary(apply_rotary_pos_emb)
    assert not probe_rotary(interleaved_rotary)
    assert not probe_rotary(lambda q, k, cos, sin: (q, k))
    assert not probe_rotary(lambda q: q)


def test_a_norm_called_with_more_than_was_recognised_runs_as_it_is() -> None:
    norm = BambaRMSNormGated(48, group_size=48)
    x, gate = torch.randn(1, 3, 48), torch.randn(1, 3, 48)
    plain, gated = norm(x), norm(x, gate)
    with probed(norm) as norms:
        assert norms == 1
        torch.testing.assert_close(norm(x, gate), gated, rtol=0, atol=0)
        torch.testing.assert_close(norm(x, gate=gate), gated, rtol=0, atol=0)
        torch.testing.assert_close(norm(x), plain)


def test_modules_are_put_back() -> None:
    model = nn.Sequential(LlamaRMSNorm(48), nn.Linear(48, 48))
    with probed(model) as norms:
        assert norms == 1 and "forward" in vars(model[0])
    assert "forward" not in vars(model[0])
