"""Layers of a graph: nodes go in, the layers they belong to and the kinds of these come out, by structure alone.

A layer is the outermost numbered module that a node was traced in. Two layers are of one kind when the same calls on
the same shapes were captured in them, whatever their weights are called.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.ops.op import find_op

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.(.*))?$")


@dataclass(frozen=True)
class LayerKind:
    """Layers of one structure.

    Attributes:
        layers: their module paths, in the order of the graph.
        mixers: what mixes tokens in each, e.g. `attention (sliding_window 512)`.
    """

    layers: tuple[str, ...]
    mixers: tuple[str, ...]

    @property
    def example(self) -> str:
        """The layer to show: the second where there are two, as the first shares nothing with a layer before it."""
        return self.layers[min(1, len(self.layers) - 1)]


def place(node: fx.Node) -> tuple[str | None, str]:
    """The layer of a node, or None, and the module in that layer (or in the model) that it was traced in."""
    if node.op in ("get_attr", "placeholder") and len(node.users) == 1:
        return place(next(iter(node.users)))  # a weight or a state belongs to whoever reads it
    path = module_path(node)
    match = _LAYER.match(path)
    return (match[1], match[2] or "") if match else (None, path)


def layer_kinds(graph: ModelGraph) -> list[LayerKind]:
    """The kinds of layers of a canonical graph, in order of first appearance."""
    signatures: dict[str, list[str]] = defaultdict(list)
    mixers: dict[str, list[str]] = defaultdict(list)
    for node in graph.graph.nodes:
        layer, _ = place(node)
        if layer is None or node.op != "call_function":
            continue
        value = node.meta.get("val")
        shape = str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__
        signatures[layer].append(f"{node.target} {shape} {_constants(node)}")
        op = find_op(node.target)
        if op is not None and op.mixes_tokens:
            mixers[layer].append(_named(node))
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for layer, signature in signatures.items():
        kinds[tuple(signature)].append(layer)
    return [LayerKind(tuple(layers), tuple(mixers[layers[0]])) for layers in kinds.values()]


def _constants(node: fx.Node) -> list[object]:
    return [None if isinstance(argument, fx.Node) else str(argument) for argument in node.args]


def _named(node: fx.Node) -> str:
    """A mixer with those of its facts that are numbers of tokens or switches."""
    op = find_op(node.target)
    assert op is not None
    facts = {
        name: value
        for name, value in op.arguments(node.args, node.kwargs).items()
        if isinstance(value, int) and not (isinstance(value, bool) and (not value or name == "causal"))
    }
    told = ", ".join(name if value is True else f"{name} {value}" for name, value in facts.items())
    return f"{op.name} ({told})" if told else op.name
