"""DropNoOps: remove calls that return their input unchanged, and pairs of transposes that undo each other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult

aten = torch.ops.aten


def _same_value(node: fx.Node) -> bool:
    """Same shape, dtype and layout as the first argument: such a cast, copy or expansion does nothing."""
    source, value = node.args[0], node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor):
        return False
    before = source.meta["val"]
    return bool(
        before.dtype == value.dtype
        and before.device == value.device
        and len(before.shape) == len(value.shape)
        and all(str(a) == str(b) for a, b in zip(before.shape, value.shape, strict=True))
        and all(str(a) == str(b) for a, b in zip(before.stride(), value.stride(), strict=True))
    )


def _is_one(node: fx.Node) -> bool:
    return isinstance(node.args[1], int | float) and node.args[1] == 1 and _same_value(node)


def _is_zero_dropout(node: fx.Node) -> bool:
    return not bool(node.args[2]) or bool(node.args[1] == 0)


_NO_OPS: dict[object, Callable[[fx.Node], bool]] = {
    aten.to.dtype: _same_value,
    aten.to.device: _same_value,
    aten.to.dtype_layout: _same_value,
    aten._to_copy.default: _same_value,
    aten.contiguous.default: _same_value,
    aten.clone.default: _same_value,
    aten.expand.default: _same_value,
    aten.slice.Tensor: _same_value,
    aten.view.default: _same_value,
    aten.reshape.default: _same_value,
    aten.mul.Tensor: _is_one,
    aten.div.Tensor: _is_one,
    aten.dropout.default: _is_zero_dropout,
    aten.feature_dropout.default: _is_zero_dropout,
    aten.detach.default: lambda _: True,
    aten.alias.default: lambda _: True,
    aten.lift_fresh_copy.default: lambda _: True,
}


@dataclass(frozen=True, kw_only=True)
class DropNoOps(Transform):
    """`x.to(x.dtype)`, `x * 1.0`, `x[:]`, dropout in eval mode, `x.transpose(1, 2).transpose(1, 2)`  become  `x`."""

    def apply(self, graph: ModelGraph) -> TransformResult:
        dropped = 0
        for node in list(graph.graph.nodes):
            if node.op != "call_function":
                continue
            source = self._unchanged(node)
            if source is not None:
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
                dropped += 1
        return TransformResult(found=dropped, rewritten=dropped)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """The earlier node this one equals, or None."""
        check = _NO_OPS.get(node.target)
        source = node.args[0] if node.args else None
        if check is not None and isinstance(source, fx.Node) and check(node):
            return source
        if node.target == aten.transpose.int and isinstance(source, fx.Node) and source.target == aten.transpose.int:
            rank = node.meta["val"].dim()
            pairs = [{dim % rank for dim in call.args[1:]} for call in (node, source)]
            inner = source.args[0]
            if pairs[0] == pairs[1] and isinstance(inner, fx.Node):
                return inner
        return None
