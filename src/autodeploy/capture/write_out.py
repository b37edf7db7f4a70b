"""write_out: a traced program whose repeated layers are single nodes goes in, the program with their nodes comes out.

Before anything is copied the trace must prove that a layer's nodes are a function of its arguments and weights alone.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from autodeploy.capture.repeated_layers import Call, NotAlike

MODEL = "model."
"""the traced wrapper holds the model under this name"""


@dataclass(frozen=True)
class _Region:
    """The nodes of one traced call between its two edges, and the getitems that give them its arguments."""

    path: str
    arguments: dict[int, fx.Node]
    nodes: list[fx.Node]
    results: Sequence[fx.Node]


def write_out(exported: ExportedProgram, calls: list[Call]) -> None:
    """Replace repeated calls by their template's nodes, in place, and drop the edges.

    Raises:
        NotAlike: the trace does not prove that the layers are alike; the program is then of no use.
    """
    graph = exported.graph_module.graph
    regions, weights = require_closed(exported, calls), _Weights(exported)
    for template, later in _to_compare(calls):
        _require_equal(regions[template], regions[later], weights)
    for node in graph.find_nodes(op="call_function", target=torch.ops.autodeploy.layer_again.default):
        call = calls[node.args[2]]
        assert call.template is not None
        _copy(graph, regions[call.template], node, call.path, weights)
    for node in graph.find_nodes(op="call_function", target=torch.ops.autodeploy.layer_edge.default):
        _bypass(graph, node, node.args[0])


def require_closed(exported: ExportedProgram, calls: list[Call]) -> dict[int, _Region]:
    """The nodes of every traced call, which read and update nothing but what is theirs.

    Raises:
        NotAlike: a layer has to do with its surroundings in other ways than by arguments and results.
    """
    graph = exported.graph_module.graph
    regions = {number: _region(graph, number, call.path) for number, call in enumerate(calls) if call.template is None}
    for region in regions.values():
        _require_closed(region)
    return regions


def _to_compare(calls: list[Call]) -> Iterator[tuple[int, int]]:
    """For every template that was used, itself and the last traced call that should be the same."""
    for template in {call.template: call for call in calls if call.template is not None}:
        traced = calls[template].kind.traced
        if traced[-1] == template:
            raise NotAlike(f"no later call shows that {calls[template].path} stands for the others")
        yield template, traced[-1]


def _region(graph: fx.Graph, number: int, path: str) -> _Region:
    enter, leave = (
        node
        for node in graph.find_nodes(op="call_function", target=torch.ops.autodeploy.layer_edge.default)
        if node.args[1] == number
    )
    following = itertools.takewhile(lambda node: node is not leave, _after(enter))
    arguments = {int(user.args[1]): user for user in enter.users}
    inner = [node for node in following if node not in enter.users]
    return _Region(path, arguments, inner, leave.args[0])


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while True:
        node = node.next
        yield node


class _Weights:
    """Parameters, buffers and constants of a program by the placeholders that stand for them."""

    def __init__(self, exported: ExportedProgram):
        placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        specs = [(spec, placeholders[spec.arg.name]) for spec in exported.graph_signature.input_specs]
        self._constants = {
            node: exported.constants[str(spec.target)] for spec, node in specs if spec.kind == InputKind.CONSTANT_TENSOR
        }
        held = [(spec, node) for spec, node in specs if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)]
        self._names = {node: str(spec.target).removeprefix(MODEL) for spec, node in held}
        self._nodes = {name: node for node, name in self._names.items()}

    def of_layer(self, node: fx.Node, path: str, other: str) -> fx.Node | None:
        """The other layer's weight in place of this layer's; None for a node that is no weight of this layer."""
        name = self._names.get(node, "")
        if not name.startswith(path + "."):
            return None
        return self._nodes.get(other + name.removeprefix(path))

    def are_equal(self, node: object, other: object) -> bool:
        """Both are constants made while tracing, of the same value."""
        if node not in self._constants or other not in self._constants:
            return False
        return torch.equal(self._constants[node], self._constants[other])

    def is_known(self, node: fx.Node) -> bool:
        return node in self._constants or node in self._names


def _require_closed(region: _Region) -> None:
    """Nodes read arguments, the layer's own weights, inputs and sizes; only the results are read by others."""
    own = {*region.nodes, *region.arguments.values()}
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source not in own and source.op != "placeholder" and not _is_size(source):
                raise NotAlike(f"{region.path} reads {source.name}, which is none of its arguments")
        if node.op != "call_function":
            raise NotAlike(f"{region.path} holds a graph of its own, {node.name}")
        updated = _updated(node)
        if updated is not None and updated in region.arguments.values():
            raise NotAlike(f"{region.path} updates its argument in place ({node.name})")
        outside = [user for user in node.users if user not in own and not _is_edge(user)]
        if outside and not _is_size(node):
            raise NotAlike(f"{outside[0].name} reads {node.name}, an inner value of {region.path}")


def _is_edge(node: fx.Node) -> bool:
    return node.target == torch.ops.autodeploy.layer_edge.default


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _updated(node: fx.Node) -> fx.Node | None:
    """What an in-place op updates, seen through views."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and _is_view(source.target):
        source = source.args[0]
    return source if isinstance(source, fx.Node) else None


def _is_view(target: object) -> bool:
    return isinstance(target, OpOverload) and any(result.alias_info is not None for result in target._schema.returns)


def _require_equal(first: _Region, second: _Region, weights: _Weights) -> None:
    """The second layer's nodes are the first's, with its own arguments and weights."""
    same: dict[fx.Node, fx.Node] = {}
    for place, node in first.arguments.items():
        if place in second.arguments:
            same[node] = second.arguments[place]

    def matches(one: Any, other: Any) -> bool:
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if one in same:
                return same[one] is other
            weight = weights.of_layer(one, first.path, second.path)
            return (weight or one) is other or weights.are_equal(one, other)
        if isinstance(one, list | tuple) and isinstance(other, list | tuple):
            return len(one) == len(other) and all(map(matches, one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(matches(one[key], other[key]) for key in one)
        return type(one) is type(other) and (one == other or one != one)

    for node, other in itertools.zip_longest(first.nodes, second.nodes):
        both = node is not None and other is not None and node.target == other.target
        if not both or not matches(node.args, other.args) or not matches(node.kwargs, other.kwargs):
            raise NotAlike(f"{first.path} and {second.path} differ: {_show(node)} and {_show(other)}")
        same[node] = other
    if not matches(first.results, second.results):
        raise NotAlike(f"{first.path} and {second.path} give different nodes as their results")


def _show(node: fx.Node | None) -> str:
    return "nothing" if node is None else str(node.format_node())


def _copy(graph: fx.Graph, template: _Region, call: fx.Node, path: str, weights: _Weights) -> None:
    """The template's nodes in place of one call, over the call's arguments and the weights at `path`."""
    arguments: Sequence[fx.Node] = call.args[0]  # type: ignore[assignment]
    copies = {node: arguments[place] for place, node in template.arguments.items()}

    def translated(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if not weights.is_known(node):
            return node
        return weights.of_layer(node, template.path, path) or node

    with graph.inserting_before(call):
        for node in template.nodes:
            copy = copies[node] = graph.node_copy(node, translated)
            stack = copy.meta.get("nn_module_stack")
            if stack:
                copy.meta["nn_module_stack"] = _moved(stack, template.path, path)
    _bypass(graph, call, [translated(node) for node in template.results])


def _moved(stack: dict[str, Any], path: str, other: str) -> dict[str, Any]:
    """A node's module stack with one layer's path replaced by another's."""
    at, to = re.compile(re.escape(MODEL + path) + r"(?=\.|@|$)"), MODEL + other
    return {at.sub(to, key): (at.sub(to, name), *rest) for key, (name, *rest) in stack.items()}


def _bypass(graph: fx.Graph, node: fx.Node, values: Any) -> None:
    """Whoever reads item i of a node reads `values[i]`; the node goes."""
    for item in list(node.users):
        item.replace_all_uses_with(values[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(node)
