"""MatchLinear: matrix products with a weight become `linear`, whichever way the model writes them."""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.checkpoint.recipe import Transpose
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.linear import linear

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MatchLinear(Transform):
    """`aten.linear(x, w, b)`, `addmm(b, x, w)`, `x @ w` and `x @ w.T`  become  `linear(x, weight, bias)`.

    Where the model keeps a weight as `[in, out]`, its recipe is transposed.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found = 0
        for node in list(graph.graph.nodes):
            parts = self._parts(graph, node) if node.op == "call_function" else None
            if parts is not None:
                found += 1
                node.replace_all_uses_with(graph.call(linear, *parts, before=node))
        return TransformResult(found=found, rewritten=found)

    def _parts(self, graph: ModelGraph, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
        """Input, weight `[out, in]` and bias, or None when the node is no product with a two-dimensional weight."""
        args = node.args
        if node.target == aten.linear.default:
            return (args[0], args[1], args[2] if len(args) > 2 else None)  # type: ignore[return-value]
        if node.target == aten.addmm.default and not node.kwargs:
            weight = self._transposed(graph, args[2], node)
            return None if weight is None else (args[1], weight, args[0])  # type: ignore[return-value]
        if node.target in (aten.matmul.default, aten.mm.default):
            weight = self._transposed(graph, args[1], node)
            return None if weight is None else (args[0], weight, None)  # type: ignore[return-value]
        return None

    def _transposed(self, graph: ModelGraph, node: object, before: fx.Node) -> fx.Node | None:
        """The transpose of a two-dimensional weight: undone where the graph had transposed it, else as a recipe."""
        if not isinstance(node, fx.Node):
            return None
        if node.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default):
            inner = node.args[0]
            recipe = graph.recipe(inner)
            return inner if isinstance(inner, fx.Node) and recipe is not None and len(recipe.shape) == 2 else None
        recipe = graph.recipe(node)
        if recipe is None or len(recipe.shape) != 2:
            return None
        return graph.weight(f"{node.target}_transposed", Transpose(recipe, 0, 1), before=before)
