"""FoldWeights: what a model computes from a weight alone before using it is done once, while the weight is read."""

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from autodeploy.checkpoint.recipe import Cast, Concat, Pointwise, Recipe, Reshape, Slice, Transpose
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_MOST_ADDED_BYTES = 8 << 20
"""What a weight may need beyond what it needed: rates and routers in float32, but no table or head."""


@dataclass(frozen=True, kw_only=True)
class FoldWeights(Transform):
    """`transpose(w, 1, 2)`, `w.reshape(...)`, `w[:n]`, `cat((v, w), 1)`, `w.float()`, `-exp(w)`  become  weights with
    recipes that say so.

    Left alone is what would be kept twice: another layout of a weight that is also read as it is, and numbers made of
    a large weight that take more memory than it. What is computed is what the CPU computes, whatever the device.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, refused = 0, []
        for node in list(graph.graph.nodes):
            recipe = _recipe(graph, node) if node.op == "call_function" else None
            if recipe is None:
                continue
            found += 1
            reason = _why_not(node, recipe)
            if reason is not None:
                refused.append(f"{node.name}: {reason}")
                continue
            node.replace_all_uses_with(graph.weight(f"{node.all_input_nodes[0].target}_folded", recipe, before=node))
            graph.graph.erase_node(node)
        return TransformResult(found=found, rewritten=found - len(refused), refused=tuple(refused))


def _why_not(node: fx.Node, recipe: Recipe) -> str | None:
    """The reason that a node is left to every step, or None."""
    shared = next((weight for weight in node.all_input_nodes if len(weight.users) > 1), None)
    if not isinstance(recipe, Cast | Pointwise):
        return None if shared is None else f"weight {shared.target} is also read elsewhere"
    added = _num_bytes(recipe) - (0 if shared is not None else _num_bytes(recipe.of))
    if added > _MOST_ADDED_BYTES:
        return f"{added >> 20} MiB more than weight {node.all_input_nodes[0].target} would be kept"
    return None


def _num_bytes(recipe: Recipe) -> int:
    return math.prod(recipe.shape) * recipe.dtype.itemsize


def _recipe(graph: ModelGraph, node: fx.Node) -> Recipe | None:
    """The recipe of a node that computes from weights alone, or None."""
    parts = [graph.recipe(source) for source in node.all_input_nodes]
    recipes = [part for part in parts if part is not None]
    value = node.meta.get("val")
    if not recipes or len(recipes) < len(parts) or not isinstance(value, torch.Tensor):
        return None
    if node.target in _CASTS:
        return _cast(recipes[0], node, value)
    return None if node.kwargs else _rearranged(recipes, node, value) or _pointwise(recipes[0], node, value)


def _rearranged(recipes: list[Recipe], node: fx.Node, value: torch.Tensor) -> Recipe | None:
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


def _cast(of: Recipe, node: fx.Node, value: torch.Tensor) -> Recipe | None:
    """The weight in another dtype; itself where it has it already. A move to a device is none."""
    if set(node.kwargs) - {"dtype"}:
        return None
    return of if of.dtype == value.dtype else Cast(of, value.dtype)


def _pointwise(of: Recipe, node: fx.Node, value: torch.Tensor) -> Recipe | None:
    """One operator of a weight and numbers, which takes each element by itself and gives the same each time."""
    operator, (first, *numbers) = node.target, node.args
    if not (isinstance(operator, OpOverload) and operator.namespace == "aten" and isinstance(first, fx.Node)):
        return None
    is_plain = torch.Tag.pointwise in operator.tags and not operator._schema.is_mutable
    if not is_plain or torch.Tag.nondeterministic_seeded in operator.tags:
        return None
    plain = tuple(number for number in numbers if number is None or isinstance(number, bool | int | float))
    if len(plain) < len(numbers):
        return None
    name = operator._schema.name.removeprefix("aten::")
    return Pointwise(of, f"{name}.{operator._overloadname}", plain, value.dtype)
