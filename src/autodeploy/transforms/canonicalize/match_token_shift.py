"""MatchTokenShift: rows moved back along the tokens, however written, become `token_shift`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.token_shift import token_shift
from autodeploy.transforms.canonicalize.loop_runs import depends_on_tokens, is_num_tokens

aten = torch.ops.aten

_ZEROS = (aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


@dataclass(frozen=True)
class _Shift:
    """`source` moved by `distance` along `dim`, after `first` (None: zeros)."""

    source: fx.Node
    dim: int
    distance: int
    first: fx.Node | None = None


@dataclass(frozen=True, kw_only=True)
class MatchTokenShift(Transform):
    """`pad(x, (0, 0, d, -d))`, `pad(x[:, :-d], (0, 0, d, 0))`, `cat([first, x[:, :-d]], 1)`  become  `token_shift`.

    What stands first must be one constant row: zeros, or something made of weights only.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found = 0
        for node in list(graph.graph.nodes):
            shift = _shift(graph, node) if node.op == "call_function" else None
            if shift is not None:
                found += 1
                node.replace_all_uses_with(_emit(graph, shift, node))
        return TransformResult(found=found, rewritten=found)


def _shift(graph: ModelGraph, node: fx.Node) -> _Shift | None:
    if node.target in _PADS:
        return _padded(graph, node)
    if node.target == aten.cat.default and len(node.args[0]) == 2:  # type: ignore[arg-type]
        return _joined(graph, node)
    return None


def pad_of_zeros(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """Source, dimension, and how much is put before and after, of a padding of one dimension with zeros."""
    arguments: list[Any] = list(node.args)
    source, pads, *rest = arguments
    is_constant = node.target == aten.constant_pad_nd.default or not rest or rest[0] == "constant"
    value = rest[-1] if rest and not isinstance(rest[-1], str) else None
    if not is_constant or (value is not None and value != 0) or not isinstance(source, fx.Node):
        return None
    pairs = [(i, pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)]
    changed = [pair for pair in pairs if pair[1:] != (0, 0)]
    if len(changed) != 1 or not all(isinstance(amount, int) for amount in changed[0]):
        return None
    index, before, after = changed[0]
    return source, source.meta["val"].dim() - 1 - index, before, after


def _padded(graph: ModelGraph, node: fx.Node) -> _Shift | None:
    padding = pad_of_zeros(node)
    if padding is None:
        return None
    source, dim, before, after = padding
    if before > 0 and after == -before and is_num_tokens(graph, source.meta["val"].shape[dim]):
        return _Shift(source, dim, before)
    cut = _all_but_last(graph, source, before)
    if before > 0 and after == 0 and cut is not None and cut[1] == dim:
        return _Shift(cut[0], dim, before)
    return None


def _joined(graph: ModelGraph, node: fx.Node) -> _Shift | None:
    arguments: list[Any] = list(node.args)
    first, rest = arguments[0]
    dim = (arguments[1] if len(arguments) > 1 else 0) % node.meta["val"].dim()
    distance = first.meta["val"].shape[dim]
    if not isinstance(distance, int) or dim == 0:
        return None
    cut = _all_but_last(graph, rest, distance)
    if cut is None or cut[1] != dim or depends_on_tokens(first):
        return None
    if first.target in _ZEROS:
        return _Shift(cut[0], dim, distance)
    return _Shift(cut[0], dim, distance, first) if distance == 1 else None


def _all_but_last(graph: ModelGraph, node: object, distance: int) -> tuple[fx.Node, int] | None:
    """For `x[.., :-distance, ..]` along the tokens: x and the dimension."""
    if not isinstance(node, fx.Node) or node.target != aten.slice.Tensor or len(node.args) < 4:
        return None
    source, dim, start, end = node.args[:4]
    dim = int(dim) % node.meta["val"].dim()  # type: ignore[arg-type]
    if start not in (0, None) or end != -distance or not isinstance(source, fx.Node):
        return None
    return (source, dim) if is_num_tokens(graph, source.meta["val"].shape[dim]) else None


def _emit(graph: ModelGraph, shift: _Shift, node: fx.Node) -> fx.Node:
    """The op on `[1, T, ...]`, between transpositions where the tokens stand elsewhere."""
    source, first = shift.source, shift.first
    if shift.dim != 1:
        source = graph.call(aten.transpose.int, source, 1, shift.dim, before=node)
        first = first and graph.call(aten.transpose.int, first, 1, shift.dim, before=node)
    if first is not None:
        first = graph.call(aten.select.int, graph.call(aten.select.int, first, 0, 0, before=node), 0, 0, before=node)
    shifted = graph.call(token_shift, source, shift.distance, first, None, before=node)
    return shifted if shift.dim == 1 else graph.call(aten.transpose.int, shifted, 1, shift.dim, before=node)
