"""Bounds of values: what functions and arithmetic promise, and that nothing is promised of the rest."""

from math import inf

import pytest
import torch
from torch import fx

from autodeploy.transforms.canonicalize.bounds import bounds

aten = torch.ops.aten


def _graph(*calls: tuple[object, ...]) -> fx.Node:
    """A chain of calls, each on the one before it."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for target, *rest in calls:
        node = graph.call_function(target, (node, *rest))  # type: ignore[arg-type]
    return node


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(aten.exp.default,)], (0, inf)),
        ([(aten.sigmoid.default,), (aten.rsub.Scalar, 1)], (0, 1)),
        ([(aten.sigmoid.default,), (aten.mul.Tensor, -0.5), (aten.add.Tensor, 1.0)], (0.5, 1)),
        ([(aten.softplus.default,), (aten.neg.default,)], (-inf, 0)),
        ([(aten.exp.default,), (aten.view.default, [4, 2]), (aten.slice.Tensor, 0, 0, 2)], (0, inf)),
        ([(aten.exp.default,), (aten.mul.Tensor, 0.0)], (0, 0)),
        ([(aten.exp.default,), (aten.sub.Tensor, 1)], (-1, inf)),
        ([(aten.exp.default,), (aten.linear.default, None)], (-inf, inf)),
        ([(aten.tanh.default,), (aten.sin.default,)], (-inf, inf)),
        ([], (-inf, inf)),
    ],
)
def test_bounds(calls: list[tuple[object, ...]], expected: tuple[float, float]) -> None:
    assert bounds(_graph(*calls)) == expected


def test_inputs_of_a_piece_are_looked_up_outside() -> None:
    piece = _graph((aten.neg.default,))
    (inside,) = piece.all_input_nodes
    assert bounds(piece, {inside: _graph((aten.sigmoid.default,))}) == (-1, 0)
