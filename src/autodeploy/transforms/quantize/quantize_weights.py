"""QuantizeWeights: products with weights become products with weights of 8 or 4 bits, made so while they are read."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from autodeploy.checkpoint.quantize import NumberFormat
from autodeploy.checkpoint.recipe import Quantize, Reshape
from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.linear import linear
from autodeploy.ops.moe import expert_linear, moe
from autodeploy.ops.op import find_op
from autodeploy.ops.quantized_linear import TILE, quantized_linear
from autodeploy.ops.quantized_moe import quantized_moe

aten = torch.ops.aten

FORMATS = {
    "int8": NumberFormat(bits=8, group_size=None),
    "int4": NumberFormat(bits=4, group_size=32, has_offsets=True),
}
"""Formats by the name that users give."""

_LOOKUPS = (aten.embedding.default, aten.index_select.default)
_CHOICES = (aten.topk.default, aten.sort.default, aten.argmax.default)


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Transform):
    """`linear(x, w)`  becomes  `quantized_linear(x, numbers(w), scales(w))`, `moe`  `quantized_moe`. Changes numbers on
    purpose.

    The head gets 8 bits in either format. Left as they are: tables that are looked up, and routers, products whose
    result is only compared to choose from, where rounding would choose others.

    Attributes:
        format: a name in `FORMATS`.
        group_size: inputs that share a scale, a multiple of 32; None for the format's own.
        has_offsets: count from a group's least weight to its largest, not around zero; None for the format's own.
    """

    enabled: bool = False
    format: str = "int8"
    group_size: int | None = None
    has_offsets: bool | None = None

    # What is wrong altogether is as far off as the logits are large; on a tiny clone with experts, whose router chooses
    # others for some tokens, it comes near. How good a format is, a real model tells.
    tolerance: ClassVar[Mapping[torch.dtype, float]] = dict.fromkeys(Transform.tolerance, 1.0)

    def apply(self, graph: ModelGraph) -> TransformResult:
        head, routers = _head(graph), _routers(graph)
        sites = [node for op in (linear, moe, expert_linear) for node in graph.nodes(op) if node not in routers]
        refused = []
        for node in sites:
            number_format = self._number_format(is_head=node is head)
            reason = _why_not(graph, node, number_format)
            if reason is not None:
                op = find_op(node.target)
                refused.append(f"{op.name if op else node} in {module_path(node) or '(top)'}: {reason}")
            elif node.target == linear.overload:
                _quantize_linear(graph, node, number_format)
            else:
                _quantize_moe(graph, node, number_format)
        return TransformResult(
            found=len(sites), rewritten=len(sites) - len(refused), expected=len(sites), refused=tuple(refused)
        )

    def _number_format(self, *, is_head: bool) -> NumberFormat:
        if is_head:
            return FORMATS["int8"]
        chosen = FORMATS[self.format]
        has_offsets = chosen.has_offsets if self.has_offsets is None else self.has_offsets
        return dataclasses.replace(chosen, group_size=self.group_size or chosen.group_size, has_offsets=has_offsets)


def _why_not(graph: ModelGraph, node: fx.Node, number_format: NumberFormat) -> str | None:
    """The reason that a product stays as it is, or None."""
    if node.target == expert_linear.overload:
        return "experts whose products stand alone have no op for fewer bits"
    is_mixture = node.target == moe.overload
    for weight in node.args[3:5] if is_mixture else node.args[1:2]:
        recipe = graph.recipe(weight)
        if recipe is None:
            return "its weight is computed, not read"
        assert isinstance(weight, fx.Node)
        if not recipe.dtype.is_floating_point or recipe.dtype == torch.float64:
            return f"its weight is {recipe.dtype}"
        rows, size = recipe.shape[-2:]
        group = number_format.group_size
        if group is not None and size % group:
            return f"{size} inputs are no multiple of {group}, the group size"
        if is_mixture and rows % TILE:
            return f"{rows} outputs of an expert are no multiple of {TILE}"
        other = next((u for u in weight.users if u.target not in (*_LOOKUPS, linear.overload, moe.overload)), None)
        if other is not None:  # it stays in memory as it is, so that another copy gains nothing
            return f"its weight is also read by {other.name}"
    return None


def _quantize_linear(graph: ModelGraph, node: fx.Node, number_format: NumberFormat) -> None:
    x, weight, bias = node.args
    parts = _parts(graph, weight, number_format, before=node)
    num_outputs = node.meta["val"].shape[-1]
    _replace(graph, node, graph.call(quantized_linear, x, *parts, bias, num_outputs, before=node))


def _quantize_moe(graph: ModelGraph, node: fx.Node, number_format: NumberFormat) -> None:
    x, indices, weights, gate_up, down, *rest = node.args
    up_parts, down_parts = (_parts(graph, weight, number_format, before=node) for weight in (gate_up, down))
    biases, facts = rest[:2], rest[2:]
    experts = graph.recipe(down)
    assert experts is not None
    arguments = (x, indices, weights, *up_parts, *down_parts, *biases, experts.shape[0], *facts)
    _replace(graph, node, graph.call(quantized_moe, *arguments, before=node))


def _replace(graph: ModelGraph, node: fx.Node, replacement: fx.Node) -> None:
    node.replace_all_uses_with(replacement)
    graph.graph.erase_node(node)


def _parts(
    graph: ModelGraph, weight: object, number_format: NumberFormat, *, before: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Nodes for the numbers, scales and offsets of a weight; experts' rows one after another."""
    recipe = graph.recipe(weight)
    assert recipe is not None and isinstance(weight, fx.Node)
    rows = math.prod(recipe.shape[:-1])
    matrix = recipe if len(recipe.shape) == 2 else Reshape(recipe, (rows, recipe.shape[-1]))
    name = str(weight.target)
    numbers = graph.weight(f"{name}_int{number_format.bits}", Quantize(matrix, number_format, "numbers"), before=before)
    scales = graph.weight(f"{name}_scales", Quantize(matrix, number_format, "scales"), before=before)
    if not number_format.has_offsets:
        return numbers, scales, None
    return numbers, scales, graph.weight(f"{name}_offsets", Quantize(matrix, number_format, "offsets"), before=before)


def _head(graph: ModelGraph) -> fx.Node | None:
    """The last product, if it is as wide as the logits."""
    (logits,) = graph.graph.output_node().args
    assert isinstance(logits, fx.Node)
    last = graph.nodes(linear)[-1:]
    return last[0] if last and last[0].meta["val"].shape[-1] == logits.meta["val"].shape[-1] else None


def _routers(graph: ModelGraph) -> set[fx.Node]:
    """Products that a choice is made by, without another product between."""
    pending = [node for choice in _CHOICES for node in graph.nodes(choice)]
    seen = set(pending)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                if source.target != linear.overload:
                    pending.append(source)
    return {node for node in seen if node.target == linear.overload}
