"""torch-simple: the transformed graph runs as it is, one call per node."""

from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.program import GraphFunction
from autodeploy.graph.model_graph import ModelGraph


def compile_eager(graph: ModelGraph) -> GraphFunction:
    """A function of the graph's inputs in order."""
    bind_kernels(graph)
    function: GraphFunction = graph.module.forward
    return function
