"""QuantizeWeights: products with weights become products with weights of fewer bits, made so while they are read."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.checkpoint.quantize import Float4Format, Float8Format, NumberFormat, Part, WeightFormat
from autodeploy.checkpoint.recipe import Quantize, Reshape
from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.fp8_linear import BLOCK_SIZE, fp8_linear
from autodeploy.ops.fp8_moe import fp8_moe
from autodeploy.ops.linear import linear
from autodeploy.ops.moe import expert_linear, moe
from autodeploy.ops.nvfp4_linear import nvfp4_linear
from autodeploy.ops.nvfp4_moe import nvfp4_moe
from autodeploy.ops.op import find_op
from autodeploy.ops.quantized_embedding import quantized_embedding
from autodeploy.ops.quantized_linear import quantized_linear
from autodeploy.ops.quantized_moe import quantized_moe

aten = torch.ops.aten

FORMATS: dict[str, WeightFormat] = {
    "int8": NumberFormat(bits=8, group_size=None),
    "int4": NumberFormat(bits=4, group_size=32, has_offsets=True),
    "fp8": Float8Format(),
    "fp8_per_block": Float8Format(BLOCK_SIZE),
    "nvfp4": Float4Format(),
}
"""Formats by the name that users give."""
_FORMAT_OF_HEAD = {"int4": "int8", "nvfp4": "fp8"}
"""Where the head has more bits."""

_LOOKUPS = (aten.embedding.default, aten.index_select.default)
_CHOICES = (aten.topk.default, aten.sort.default, aten.argmax.default)


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Transform):
    """`linear(x, w)`  becomes  `quantized_linear(x, numbers(w), scales(w))`, `moe`  `quantized_moe`, or the like of the
    format. Changes numbers on purpose.

    The head gets 8 bits at least; where its weight is the table of embeddings too, whole numbers serve both. Left as
    they are: other tables that are looked up, and routers, products whose result is only compared to choose from, where
    rounding would choose others.

    Attributes:
        format: a name in `FORMATS`.
        group_size: of whole numbers, inputs that share a scale, a multiple of 32; None for the format's own.
        has_offsets: of whole numbers: count from a group's least weight to its largest, not around zero; None for the
            format's own.
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

    def _number_format(self, *, is_head: bool) -> WeightFormat:
        chosen = FORMATS[_FORMAT_OF_HEAD.get(self.format, self.format) if is_head else self.format]
        if is_head or not isinstance(chosen, NumberFormat):
            return chosen
        has_offsets = chosen.has_offsets if self.has_offsets is None else self.has_offsets
        return dataclasses.replace(chosen, group_size=self.group_size or chosen.group_size, has_offsets=has_offsets)


def _why_not(graph: ModelGraph, node: fx.Node, number_format: WeightFormat) -> str | None:
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
        if is_mixture and rows % number_format.rows_together:
            return f"{rows} outputs of an expert are no multiple of {number_format.rows_together}"
        other = next((u for u in weight.users if u.target not in (*_LOOKUPS, linear.overload, moe.overload)), None)
        if other is not None:  # it stays in memory as it is, so that another copy gains nothing
            return f"its weight is also read by {other.name}"
    return None


def _quantize_linear(graph: ModelGraph, node: fx.Node, number_format: WeightFormat) -> None:
    x, weight, bias = node.args
    parts = _parts(graph, weight, number_format, before=node)
    arguments: tuple[Any, ...]
    if isinstance(number_format, NumberFormat):
        op, arguments = quantized_linear, (x, *_with_offsets(parts), bias, node.meta["val"].shape[-1])
        _share_with_lookups(graph, weight, parts)
    elif isinstance(number_format, Float8Format):
        op, arguments = fp8_linear, (x, *parts.values(), bias, number_format.block_size)
    else:
        op, arguments = nvfp4_linear, (x, *parts.values(), bias)
    _replace(graph, node, graph.call(op, *arguments, before=node))


def _share_with_lookups(graph: ModelGraph, weight: object, parts: dict[Part, fx.Node]) -> None:
    """Let embeddings of a weight look up the parts that it was rounded to, so that it need not be kept itself."""
    assert isinstance(weight, fx.Node)
    for lookup in [user for user in weight.users if user.target == aten.embedding.default and user.args[0] is weight]:
        with graph.graph.inserting_before(lookup):
            copies = {part: graph.graph.get_attr(str(node.target)) for part, node in parts.items()}
        for part, copy in copies.items():
            copy.meta["val"] = parts[part].meta["val"]
        rows = lookup.meta["val"]
        arguments = (lookup.args[1], *_with_offsets(copies), rows.shape[-1], rows.dtype)
        _replace(graph, lookup, graph.call(quantized_embedding, *arguments, before=lookup))


def _quantize_moe(graph: ModelGraph, node: fx.Node, number_format: WeightFormat) -> None:
    x, indices, weights, gate_up, down, *rest = node.args
    up_parts, down_parts = (_parts(graph, weight, number_format, before=node) for weight in (gate_up, down))
    biases, facts = rest[:2], rest[2:]
    experts = graph.recipe(down)
    assert experts is not None
    arguments: tuple[Any, ...]
    if isinstance(number_format, NumberFormat):
        op = quantized_moe
        arguments = (*_with_offsets(up_parts), *_with_offsets(down_parts), *biases, experts.shape[0])
    else:
        op = fp8_moe if isinstance(number_format, Float8Format) else nvfp4_moe
        size = (number_format.block_size,) if isinstance(number_format, Float8Format) else ()
        arguments = (*up_parts.values(), *down_parts.values(), *biases, experts.shape[0], *size)
    _replace(graph, node, graph.call(op, x, indices, weights, *arguments, *facts, before=node))


def _replace(graph: ModelGraph, node: fx.Node, replacement: fx.Node) -> None:
    node.replace_all_uses_with(replacement)
    graph.graph.erase_node(node)


def _parts(graph: ModelGraph, weight: object, number_format: WeightFormat, *, before: fx.Node) -> dict[Part, fx.Node]:
    """Nodes for the parts of a weight, in order; experts' rows one after another."""
    recipe = graph.recipe(weight)
    assert recipe is not None and isinstance(weight, fx.Node)
    rows = math.prod(recipe.shape[:-1])
    matrix = recipe if len(recipe.shape) == 2 else Reshape(recipe, (rows, recipe.shape[-1]))
    return {
        part: graph.weight(
            f"{weight.target}_{number_format.name if part == 'numbers' else part}",
            Quantize(matrix, number_format, part),
            before=before,
        )
        for part in number_format.parts
    }


def _with_offsets(parts: dict[Part, fx.Node]) -> tuple[fx.Node | None, ...]:
    return parts["numbers"], parts["scales"], parts.get("offsets")


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
