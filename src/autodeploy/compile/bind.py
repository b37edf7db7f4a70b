"""Binding: op nodes of a lowered graph go in, direct calls of the chosen providers' functions come out."""

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import REFERENCE


def bind_kernels(graph: ModelGraph, *, keep_opaque: bool) -> None:
    """Replace each op node's target by its provider's function, so that a step calls kernels without a dispatcher.

    Args:
        keep_opaque: leave ops that look at tensor values as registered operators, for a compiler that would otherwise
            trace into them.
    """
    for node, op in list(graph.op_nodes()):
        provider = node.meta["provider"]
        if op.opaque and keep_opaque and provider == REFERENCE:
            continue
        node.target = op.reference if provider == REFERENCE else op.kernels[provider].function
    graph.module.recompile()
