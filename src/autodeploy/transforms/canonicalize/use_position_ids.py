"""UsePositionIds: positions that a model counts from the row's start are taken from `position_ids` instead.

In a packed row every sequence starts again at 0, so `arange(T)` and `table[:T]` would give all but the first sequence
the wrong positions. Both are the same statement about positions and become a look-up by `position_ids`.
"""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class UsePositionIds(Transform):
    """`arange(T)`  becomes  `position_ids[0]`; `table[:T]` of a weight or constant  becomes  `table[position_ids[0]]`.

    Runs after attention is matched, when the arithmetic that built masks is gone.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        input_ids, position_ids = graph.input("input_ids"), graph.input("position_ids")
        if input_ids is None or position_ids is None:
            return TransformResult()
        num_tokens = str(input_ids.meta["val"].shape[1])
        sites = [node for node in graph.graph.nodes if _is_arange(node, num_tokens) or _is_prefix(node, num_tokens)]
        if not sites:
            return TransformResult()
        first = next(node for node in graph.graph.nodes if node.op == "call_function")
        positions = graph.call(aten.select.int, position_ids, 0, 0, before=first)
        for node in sites:
            node.replace_all_uses_with(self._replacement(graph, node, positions))
        return TransformResult(found=len(sites), rewritten=len(sites))

    def _replacement(self, graph: ModelGraph, node: fx.Node, positions: fx.Node) -> fx.Node:
        if _is_arange(node, "", any_length=True):
            return graph.call(aten.to.dtype, positions, node.meta["val"].dtype, before=node)
        table, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        return graph.call(aten.index_select.default, table, dim, positions, before=node)


def _is_arange(node: fx.Node, num_tokens: str, *, any_length: bool = False) -> bool:
    if node.target not in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return False
    starts_at_zero = bool(node.target == aten.arange.default or node.args[0] == 0)
    steps_by_one = node.target != aten.arange.start_step or len(node.args) < 3 or node.args[2] == 1
    return starts_at_zero and bool(steps_by_one) and (any_length or str(node.meta["val"].shape[0]) == num_tokens)


def _is_prefix(node: fx.Node, num_tokens: str) -> bool:
    """`table[:T]` along some dimension, of a weight or constant."""
    if node.target != aten.slice.Tensor or len(node.args) < 4:
        return False
    table, dim, start, _ = node.args[:4]
    is_constant = isinstance(table, fx.Node) and table.op == "get_attr"
    return is_constant and start in (0, None) and str(node.meta["val"].shape[dim]) == num_tokens
