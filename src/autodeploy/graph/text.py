"""Graphs as text: a compact listing with shapes and weights, and the difference between two listings."""

import difflib
import operator

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import find_op


def graph_text(graph: ModelGraph) -> str:
    """One line per node: name, type and call, with the recipe behind each weight."""
    return "\n".join(node_text(graph, node) for node in graph.graph.nodes) + "\n"


def diff_text(before: str, after: str, *, names: tuple[str, str] = ("before", "after")) -> str:
    """Unified difference of two listings; empty when they are the same."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=2)
    return "\n".join(lines)


def node_text(graph: ModelGraph, node: fx.Node) -> str:
    """One node: name, type and call."""
    if node.op == "output":
        return f"return {fx.node.map_arg(node.args[0], str)}"
    label = f"%{node.name}: {_type(node.meta.get('val'))}"
    if node.op == "placeholder":
        return f"{label} = input {node.target}"
    if node.op == "get_attr":
        return f"{label} = weight {graph.weights.get(str(node.target), 'constant')}"
    op = find_op(node.target)
    name = op.name if op is not None else "getitem" if node.target is operator.getitem else str(node.target)
    arguments = ", ".join([_argument(value) for value in node.args])
    arguments += "".join(f", {key}={_argument(value)}" for key, value in node.kwargs.items())
    provider = f"  [{node.meta['provider']}]" if "provider" in node.meta else ""
    return f"{label} = {name}({arguments}){provider}"


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_argument(part) for part in value) + "]"
    return repr(value)


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_type(part) for part in value) + ")"
    return type(value).__name__
