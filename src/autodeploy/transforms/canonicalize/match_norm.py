"""MatchNorm: torch's own normalisation functions become canonical norms (modules are recognised at capture)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.norm import layer_norm, rms_norm

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MatchNorm(Transform):
    """`aten.layer_norm` and `aten.rms_norm` over the last dimension  become  `layer_norm` and `rms_norm`."""

    def apply(self, graph: ModelGraph) -> TransformResult:
        refused: list[str] = []
        nodes = graph.nodes(aten.layer_norm.default) + graph.nodes(aten.rms_norm.default)
        for node in nodes:
            if len(_argument(node, 1)) != 1:
                refused.append(f"{node.name} normalises over {len(_argument(node, 1))} dimensions")
                continue
            node.replace_all_uses_with(self._replacement(graph, node))
        return TransformResult(found=len(nodes), rewritten=len(nodes) - len(refused), refused=tuple(refused))

    def _replacement(self, graph: ModelGraph, node: fx.Node) -> fx.Node:
        x, weight = node.args[0], _argument(node, 2)
        if node.target == aten.layer_norm.default:
            return graph.call(layer_norm, x, weight, _argument(node, 3), _argument(node, 4, 1e-5), before=node)
        assert isinstance(x, fx.Node)
        eps = _argument(node, 3)
        eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
        return graph.call(rms_norm, x, weight, eps, 0.0, True, before=node)


def _argument(node: fx.Node, index: int, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else default
