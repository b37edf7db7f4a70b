"""evaluate(): parts of a graph run on numbers, at any length, and refusal of what depends on more than positions."""

import pytest
import torch
from torch import Tensor, fx, nn

from autodeploy.transforms.canonicalize.evaluate import NotEvaluable, evaluate, shape_at
from tests.graphs import Sketch, captured

aten = torch.ops.aten


def _body(self: nn.Module, x: Tensor) -> Tensor:
    tokens = x.shape[1]
    positions = torch.arange(tokens)
    ramp = torch.ones_like(x).sum(-1)[0] * 0.5  # reads the shape of x only
    table = self.table[:tokens] * 2
    return x + (positions + ramp + table)[:, None] + x.sum(-1, keepdim=True)


def _node(graph: fx.Graph, target: object) -> fx.Node:
    return next(node for node in graph.nodes if node.target == target)


@pytest.mark.parametrize("length", [2, 31])
def test_values_at_another_length_than_the_traced_one(length: int) -> None:
    graph = captured(Sketch(_body, table=torch.randn(64)))
    adds = [node for node in graph.graph.nodes if node.target == aten.add.Tensor and node.meta["val"].dim() == 1]
    table = next(value for value in graph.module.buffers())
    expected = torch.arange(length) + 8.0 + 2 * table[:length]
    torch.testing.assert_close(evaluate(graph, adds[-1], length), expected)
    assert shape_at(graph, adds[-1].meta["val"], length) == (length,)


def test_given_values_stand_in_for_what_cannot_be_computed() -> None:
    graph = captured(Sketch(_body, table=torch.randn(64)))
    embedding, row_sum = _node(graph.graph, aten.embedding.default), graph.nodes(aten.sum.dim_IntList)[-1]
    given = torch.randn(1, 7, 16)
    torch.testing.assert_close(evaluate(graph, row_sum, 7, {embedding: given}), given.sum(-1, keepdim=True))


def test_token_ids_and_weights_are_refused_by_name() -> None:
    graph = captured(Sketch(_body, table=torch.randn(64)))
    with pytest.raises(NotEvaluable, match=r"weight|token ids"):
        evaluate(graph, _node(graph.graph, aten.embedding.default), 5)
    (ids,) = [node for node in graph.inputs() if node.target == "input_ids"]
    with pytest.raises(NotEvaluable, match="token ids"):
        evaluate(graph, ids, 5)


def test_narrow_floats_are_run_wide() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        thirds = torch.full((x.shape[1],), 1 / 3, dtype=torch.bfloat16)
        return x + (thirds * 3)[:, None]

    graph = captured(Sketch(body))
    product = _node(graph.graph, aten.mul.Tensor)
    assert evaluate(graph, product, 4).dtype == torch.float32
    torch.testing.assert_close(evaluate(graph, product, 4), torch.ones(4), rtol=0, atol=1e-7)
