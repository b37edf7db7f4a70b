"""FuseQKV: the projections that feed one token mixer become one product."""

from dataclasses import dataclass

from torch import fx

from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.linear import linear
from autodeploy.ops.op import find_op
from autodeploy.transforms.fuse.parallel_linears import fuse_linears, parallel_linears, split_output, why_not_fusable


@dataclass(frozen=True, kw_only=True)
class FuseQKV(Transform):
    """`linear(x, q)`, `linear(x, k)`, `linear(x, v)`  become  `split(linear(x, concat(q, k, v)))`.

    Holds for any linears of one input whose results meet in a token mixer, before another linear.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        groups = [mixing for group in parallel_linears(graph) if len(mixing := _feeding_mixers(group)) > 1]
        refused = []
        for group in groups:
            reason = why_not_fusable(graph, group)
            if reason is not None:
                refused.append(f"projections in {module_path(group[0]) or '(top)'}: {reason}")
                continue
            fused = fuse_linears(graph, group, f"{group[0].args[1]}_qkv")
            split_output(graph, fused, group)
        return TransformResult(
            found=len(groups), rewritten=len(groups) - len(refused), expected=len(groups), refused=tuple(refused)
        )


def _feeding_mixers(group: list[fx.Node]) -> list[fx.Node]:
    return [node for node in group if _reaches_mixer(node)]


def _reaches_mixer(node: fx.Node) -> bool:
    """Following uses forward without crossing another linear, a token mixer is reached."""
    pending, seen = list(node.users), set(node.users)
    while pending:
        user = pending.pop()
        op = find_op(user.target)
        if op is not None and op.mixes_tokens:
            return True
        if op is linear:
            continue
        for following in user.users:
            if following not in seen:
                seen.add(following)
                pending.append(following)
    return False
