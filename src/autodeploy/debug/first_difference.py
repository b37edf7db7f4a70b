"""Where two runs part: values of a graph's nodes in two runs go in; the first node that differs comes out, in words.

A transform keeps the nodes it does not touch, by name. The first untouched node whose value has changed therefore
reads, directly or through nodes that the transform made, what the transform got wrong.
"""

import operator
from collections.abc import Collection

from torch import fx

from autodeploy.debug.compare import relative_error
from autodeploy.debug.graph_run import GraphRun
from autodeploy.graph.model_graph import ModelGraph, module_path, source_line
from autodeploy.ops.op import find_op


def first_difference(graph: ModelGraph, found: GraphRun, expected: GraphRun, tolerance: float) -> fx.Node:
    """The first node of `graph` whose value differs between two runs; the output where none of those in both does."""
    # A fault that moves logits by 1e-2 is no rounding at its own node either, and rounding there is not the fault.
    threshold = max(tolerance, min(1e-2, relative_error(found.logits, expected.logits) / 100))
    nodes: list[fx.Node] = list(graph.graph.nodes)
    for node in nodes:
        mine, other = found.values.get(node.name), expected.values.get(node.name)
        if mine is None or other is None or mine.shape != other.shape:
            continue
        if relative_error(mine, other) > threshold:
            return node.all_input_nodes[0] if node.target is operator.getitem else node
    return nodes[-1]


def new_inputs(node: fx.Node, known: Collection[str]) -> list[fx.Node]:
    """Nodes that feed a node, directly or through each other, and were not in the graph before; in graph order."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.name not in known and source.op == "call_function" and source not in found:
                found.add(source)
                pending.append(source)
    return sorted(found)


def describe(node: fx.Node, made: list[fx.Node]) -> str:
    """A node, what was made before it, its module and its source line, for people."""
    what = "the logits" if node.op == "output" else called(node)
    behind = f", behind {', '.join(called(other) for other in made[-3:])}" if made else ""
    place = made[-1] if made else node.all_input_nodes[-1] if node.op == "output" else node
    return f"{what}{behind}, in module {module_path(place) or '(top)'} at {source_line(place)}"


def called(node: fx.Node) -> str:
    """A node's name and what it calls, with the kernel's provider."""
    op = find_op(node.target)
    provider = f" [{node.meta['provider']}]" if "provider" in node.meta else ""
    return f"%{node.name} = {op.name if op is not None else node.target}{provider}"
