"""FuseGateUp: the two projections of a gated MLP become one product, followed by one activation op."""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.linear import linear
from autodeploy.ops.mlp import gated_activation
from autodeploy.transforms.fuse.parallel_linears import fuse_linears, why_not_fusable

aten = torch.ops.aten

_ACTIVATIONS: dict[object, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}


@dataclass(frozen=True, kw_only=True)
class FuseGateUp(Transform):
    """`act(linear(x, gate)) * linear(x, up)`  becomes  `gated_activation(linear(x, concat(gate, up)), act)`.

    A model that already stores gate and up as one weight, `act(gate) * up` over the halves of one linear, is rewritten
    the same way without touching the weight.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, refused = 0, []
        for node in graph.nodes(aten.mul.Tensor):
            site = gated(node)
            if site is None:
                continue
            activation, gate, up = site
            gate_up = halves(gate, up)
            if gate_up is None and not _are_parallel(gate, up):
                continue
            found += 1
            if gate_up is None:
                reason = why_not_fusable(graph, [gate, up])
                if reason is not None or gate.meta["val"].shape[-1] != up.meta["val"].shape[-1]:
                    refused.append(f"gated MLP in {module_path(node) or '(top)'}: {reason or 'widths differ'}")
                    continue
                gate_up = fuse_linears(graph, [gate, up], f"{gate.args[1]}_up")
            node.replace_all_uses_with(graph.call(gated_activation, gate_up, activation, before=node))
        return TransformResult(found=found, rewritten=found - len(refused), expected=found, refused=tuple(refused))


def gated(node: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
    """Activation, gate and up of `act(gate) * up`, in either order."""
    for activated, up in (node.args[:2], node.args[1::-1]):
        if not isinstance(activated, fx.Node) or not isinstance(up, fx.Node):
            continue
        name = _activation(activated)
        gate = activated.args[0] if name else None
        if name and isinstance(gate, fx.Node) and len(activated.users) == 1:
            return name, gate, up
    return None


def _activation(node: fx.Node) -> str | None:
    if node.target == aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)


def _are_parallel(gate: fx.Node, up: fx.Node) -> bool:
    nodes = (gate, up)
    return all(n.target == linear.overload and len(n.users) == 1 for n in nodes) and gate.args[0] is up.args[0]


def halves(gate: fx.Node, up: fx.Node) -> fx.Node | None:
    """The tensor whose last dimension gate and up are the first and second half of, or None."""
    source = gate.args[0]
    same = isinstance(source, fx.Node) and up.args and up.args[0] is source and gate.args[1:] == (0,)
    if not same or up.args[1:] != (1,) or not isinstance(source, fx.Node):
        return None
    inner = source.args[0]
    if not isinstance(inner, fx.Node) or source.args[2:] not in ((-1,), (inner.meta["val"].dim() - 1,)):
        return None
    sizes = {aten.chunk.default: 2, aten.split.Tensor: inner.meta["val"].shape[-1] // 2}
    is_halved = source.target in sizes and source.args[1] == sizes[source.target]
    return inner if is_halved and inner.meta["val"].shape[-1] % 2 == 0 else None
