"""FuseGatedNormCasts: a gated norm that widens what it reads and is rounded again does both by itself."""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.norm import gated_rms_norm

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default)
_RESHAPES = (aten.view.default, aten.reshape.default)


@dataclass(frozen=True, kw_only=True)
class FuseGatedNormCasts(Transform):
    """`gated_rms_norm(x.float().view(...), gate, w).to(x.dtype)`  becomes  `gated_rms_norm(x.view(...), gate, w)`.

    In float32 there is no rounding before the weight's product; so is it in the op's own float32, which
    `scale_in_float32` asks for. The bits are the same.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found = [node for node in graph.nodes(gated_rms_norm) if _dtype(node.args[0]) != _dtype(node.args[1])]
        refused = []
        for norm in found:
            reason = _why_not(norm)
            if reason is None:
                _fuse(graph, norm)
            else:
                refused.append(f"{norm.name}: {reason}")
        return TransformResult(found=len(found), rewritten=len(found) - len(refused), refused=tuple(refused))


def _why_not(norm: fx.Node) -> str | None:
    narrow = _dtype(norm.args[1])
    source = _reshapes(norm)[-1].args[0]
    if not (isinstance(source, fx.Node) and source.target in _CASTS and _dtype(source.args[0]) == narrow):
        return f"what it reads is no {narrow} made wider"
    other = next((user for user in norm.users if user.target not in _CASTS or _dtype(user) != narrow), None)
    return None if other is None else f"{other.name} reads its result unrounded"


def _reshapes(norm: fx.Node) -> list[fx.Node]:
    """The norm, and before it the calls that only reshape its input, last to first."""
    chain = [norm]
    while isinstance(source := chain[-1].args[0], fx.Node) and source.target in _RESHAPES:
        chain.append(source)
    return chain


def _fuse(graph: ModelGraph, norm: fx.Node) -> None:
    _, *reshapes = chain = _reshapes(norm)
    cast = chain[-1].args[0]
    assert isinstance(cast, fx.Node)
    x = cast.args[0]
    for reshape in reversed(reshapes):
        x = graph.call(reshape.target, x, *reshape.args[1:], before=norm, like=reshape)  # type: ignore[arg-type]
    *facts, _ = norm.args[1:]
    fused = graph.call(gated_rms_norm, x, *facts, True, before=norm, like=norm)
    for user in list(norm.users):
        user.replace_all_uses_with(fused)
        graph.graph.erase_node(user)
    graph.graph.erase_node(norm)


def _dtype(node: object) -> torch.dtype:
    assert isinstance(node, fx.Node)
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
