"""What the last linear layer reads is kept for every token, and nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.build import transform
from autodeploy.capture.export import capture
from autodeploy.config import CompileOptions
from autodeploy.errors import UnsupportedModelError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.keep_rows import cached_keep_rows
from autodeploy.transforms.cache.keep_hidden_states import KeepHiddenStates, kept_state
from tests import tiny

WANTED = CompileOptions(transforms={"keep_hidden_states": {"enabled": True}})


def lowered(model: nn.Module, options: CompileOptions) -> ModelGraph:
    graph = capture(model)
    transform(graph, options, torch.device("cpu"))
    return graph


def test_one_state_more_of_the_hidden_size() -> None:
    model = tiny.TINY["gemma2"]()
    plain, keeping = lowered(model, CompileOptions()), lowered(model, WANTED)
    assert not plain.nodes(cached_keep_rows) and len(keeping.nodes(cached_keep_rows)) == 1
    (spec,) = [spec for spec in keeping.states if spec.name == kept_state(keeping)]
    assert spec.shape == (tiny.HIDDEN,) and spec.group == "full"
    assert len(keeping.states) == len(plain.states) + 1
    kinds = [[op.name for _, op in graph.op_nodes() if op is not cached_keep_rows] for graph in (plain, keeping)]
    assert kinds[0] == kinds[1]


def test_a_model_without_a_linear_head_is_refused() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embedding(input_ids).sin()

    graph = capture(Squared())
    with pytest.raises(UnsupportedModelError, match="last linear layer"):
        KeepHiddenStates(enabled=True).apply(graph)
