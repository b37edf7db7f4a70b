"""BindBoundaries: a token mixer that a model called without sequence boundaries gets those of the packed row."""

from dataclasses import dataclass

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult

PARAMETER = "cu_seqlens"


@dataclass(frozen=True, kw_only=True)
class BindBoundaries(Transform):
    """`mixer(x, cu_seqlens=None)`  becomes  `mixer(x, cu_seqlens)`.

    A model is written for one sequence and knows nothing of packing; an op that mixes tokens declares a `cu_seqlens`
    parameter, the model leaves it None, and the graph fills it in.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        boundaries = graph.input(PARAMETER)
        found = 0
        for node, op in list(graph.op_nodes()):
            if PARAMETER not in op.parameters:
                continue
            arguments = op.arguments(node.args, node.kwargs)
            if arguments[PARAMETER] is None:
                arguments[PARAMETER] = boundaries
                node.args, node.kwargs = tuple(arguments.values()), {}
                found += 1
        return TransformResult(found=found, rewritten=found)
