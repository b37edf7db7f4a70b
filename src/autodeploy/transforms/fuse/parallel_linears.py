"""Parallel linears: linears of one input, fused into one wider product whose output is split again."""

from collections import defaultdict

import torch
from torch import fx

from autodeploy.checkpoint.recipe import Concat
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.linear import linear

aten = torch.ops.aten


def parallel_linears(graph: ModelGraph) -> list[list[fx.Node]]:
    """Groups of two or more `linear` nodes that read the same input, in graph order."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes(linear):
        source = node.args[0]
        if isinstance(source, fx.Node):
            groups[source].append(node)
    return [group for group in groups.values() if len(group) > 1]


def why_not_fusable(graph: ModelGraph, group: list[fx.Node]) -> str | None:
    """The reason this group cannot become one product, or None."""
    weights = [graph.recipe(node.args[1]) for node in group]
    biases = [node.args[2] for node in group]
    if any(weight is None for weight in weights):
        return "a weight is computed, not read"
    if len({weight.dtype for weight in weights if weight is not None}) > 1:
        return "the weights differ in dtype"
    if any(len(node.args[1].users) > 1 for node in group):  # type: ignore[union-attr]
        return "a weight is shared with another place"
    if len({bias is None for bias in biases}) > 1:
        return "some have a bias and some have none"
    if any(bias is not None and graph.recipe(bias) is None for bias in biases):
        return "a bias is computed, not read"
    return None


def fuse_linears(graph: ModelGraph, group: list[fx.Node], name: str) -> fx.Node:
    """One linear in place of a fusable group; its output holds the group's outputs side by side, in group order."""
    first = group[0]
    parts = [graph.recipe(node.args[1]) for node in group]
    weight = graph.weight(name + "_weight", Concat(tuple(part for part in parts if part), 0), before=first)
    bias = None
    if first.args[2] is not None:
        biases = [graph.recipe(node.args[2]) for node in group]
        bias = graph.weight(name + "_bias", Concat(tuple(part for part in biases if part), 0), before=first)
    return graph.call(linear, first.args[0], weight, bias, before=first)


def split_output(graph: ModelGraph, fused: fx.Node, group: list[fx.Node]) -> None:
    """Give each node of the group its columns of the fused output, as views."""
    sizes = [int(node.meta["val"].shape[-1]) for node in group]
    split = graph.call(aten.split_with_sizes.default, fused, sizes, -1, before=group[0])
    for index, node in enumerate(group):
        node.replace_all_uses_with(graph.item(split, index, before=group[0]))
