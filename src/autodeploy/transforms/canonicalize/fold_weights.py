"""FoldWeights: what a model does to the layout of a weight before using it is done once, while the weight is read."""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.checkpoint.recipe import Concat, Recipe, Reshape, Slice, Transpose
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim)


@dataclass(frozen=True, kw_only=True)
class FoldWeights(Transform):
    """`transpose(w, 1, 2)`, `w.reshape(...)`, `w[:n]`, `cat((v, w), 1)`  become  weights with recipes that say so.

    Left alone is a weight that is also read as it is: it would be kept twice.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, refused = 0, []
        for node in list(graph.graph.nodes):
            recipe = _recipe(graph, node) if node.op == "call_function" else None
            if recipe is None:
                continue
            found += 1
            shared = next((w for w in node.all_input_nodes if len(w.users) > 1), None)
            if shared is not None:
                refused.append(f"{node.name}: weight {shared.target} is also read elsewhere")
                continue
            node.replace_all_uses_with(graph.weight(f"{node.all_input_nodes[0].target}_folded", recipe, before=node))
            graph.graph.erase_node(node)
        return TransformResult(found=found, rewritten=found - len(refused), refused=tuple(refused))


def _recipe(graph: ModelGraph, node: fx.Node) -> Recipe | None:
    """The recipe of a node that only rearranges weights, or None."""
    parts = [graph.recipe(source) for source in node.all_input_nodes]
    recipes = [part for part in parts if part is not None]
    value = node.meta.get("val")
    if not recipes or len(recipes) < len(parts) or node.kwargs or not isinstance(value, torch.Tensor):
        return None
    of, shape = recipes[0], tuple(value.shape)
    rank = len(of.shape)
    if node.target in _RESHAPES:
        return Reshape(of, shape)
    if node.target == aten.transpose.int:
        first, second = (int(dim) % rank for dim in node.args[1:])  # type: ignore[arg-type]
        return Transpose(of, first, second)
    if node.target == aten.cat.default and len(node.args[0]) == len(recipes):  # type: ignore[arg-type]
        return Concat(tuple(recipes), int(node.args[1] if len(node.args) > 1 else 0) % rank)  # type: ignore[arg-type]
    if node.target == aten.slice.Tensor and len(node.args) < 5:
        dim, start = (int(value or 0) for value in (*node.args[1:3], 0, 0)[:2])  # type: ignore[arg-type]
        dim %= rank
        return Slice(of, dim, start % of.shape[dim] if start < 0 else min(start, of.shape[dim]), shape[dim])
    return None
