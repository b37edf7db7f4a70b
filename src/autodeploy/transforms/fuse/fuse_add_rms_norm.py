"""FuseAddRMSNorm: the residual sum and the norm that reads it become one op."""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.norm import add_rms_norm, rms_norm

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FuseAddRMSNorm(Transform):
    """`total = x + y; rms_norm(total, w)`  becomes  `add_rms_norm(x, y, w)`, which also gives the total."""

    def apply(self, graph: ModelGraph) -> TransformResult:
        sites = [node for node in graph.nodes(rms_norm) if _reads_sum(node)]
        rewritten = 0
        for norm in sites:
            total = norm.args[0]
            assert isinstance(total, fx.Node)
            if total.target != aten.add.Tensor:
                continue  # its sum went into the fused op of an earlier norm
            fused = graph.call(add_rms_norm, *total.args, *norm.args[1:], before=total, like=norm)
            if not _defined_before(norm.args[1], fused):
                graph.graph.erase_node(fused)
                continue
            normed, summed = (graph.item(fused, index, before=total) for index in range(2))
            norm.replace_all_uses_with(normed)
            total.replace_all_uses_with(summed)
            graph.graph.erase_node(norm)
            rewritten += 1
        return TransformResult(found=len(sites), rewritten=rewritten, expected=len(sites))


def _reads_sum(norm: fx.Node) -> bool:
    """The norm's input is a plain sum of two tensors of its own shape and dtype."""
    total = norm.args[0]
    if not isinstance(total, fx.Node) or total.target != aten.add.Tensor or total.kwargs:
        return False
    value = total.meta["val"]
    return all(
        isinstance(part, fx.Node)
        and part.meta["val"].dtype == value.dtype
        and len(part.meta["val"].shape) == value.dim()
        and all(str(a) == str(b) for a, b in zip(part.meta["val"].shape, value.shape, strict=True))
        for part in total.args
    )


def _defined_before(node: object, user: fx.Node) -> bool:
    return not isinstance(node, fx.Node) or node < user
