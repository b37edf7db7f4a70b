"""Gated matrix memories are known by their numbers, their epsilon included; near misses are left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMBackend

from autodeploy.capture.matrix_memory import MemoryFacts, memories_recognised, probe_memory
from autodeploy.ops import mlstm


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_a_backend_of_chunks_and_steps_is_one(eps: float) -> None:
    backend = xLSTMBackend(xLSTMConfig(chunk_size=8, eps=eps))
    assert probe_memory(backend) == MemoryFacts(eps, gives_state=True)
    original = backend.forward
    with memories_recognised(nn.ModuleList([backend])):
        assert backend.forward != original
    assert backend.forward == original


class Memory(nn.Module):
    def __init__(self, scale: float = 1.0, gate: float = 1.0):
        super().__init__()
        self.scale, self.gate = scale, gate

    def forward(self, query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor, **_: Any) -> Tensor:
        parts = (part.transpose(1, 2) for part in (query, key, value, igate, self.gate * fgate))
        return mlstm(*parts, self.scale * query.shape[-1] ** -0.5, 1e-5, None).transpose(1, 2)


def test_facts_and_near_misses() -> None:
    assert probe_memory(Memory()) == MemoryFacts(1e-5, gives_state=False)
    assert probe_memory(Memory(scale=1.1)) is None
    assert probe_memory(Memory(gate=0.9)) is None
    assert probe_memory(nn.Identity()) is None


def test_a_call_with_an_earlier_state_reaches_the_module() -> None:
    backend = xLSTMBackend(xLSTMConfig(chunk_size=8))
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    gates = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    state = (torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4), torch.zeros(1, 2, 1))
    call = dict(zip(("query", "key", "value", "igate", "fgate"), (q, k, v, *gates), strict=True))
    call |= dict(zip(("c_initial", "n_initial", "m_initial"), state, strict=True))
    expected = backend(**call)[0]
    with memories_recognised(nn.ModuleList([backend])):
        assert torch.equal(backend(**call)[0], expected)
