"""MatchTokenWindow: a sliding window of tokens, unfolded from a padded row, becomes token shifts side by side."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.token_shift import token_shift
from autodeploy.transforms.canonicalize.loop_runs import is_num_tokens
from autodeploy.transforms.canonicalize.match_token_shift import pad_of_zeros

aten = torch.ops.aten

_PADS = (aten.pad.default, aten.constant_pad_nd.default)


@dataclass(frozen=True, kw_only=True)
class MatchTokenWindow(Transform):
    """`pad(x, (w - 1, 0)).unfold(-1, w, 1)` along the tokens  becomes  `stack([shift(shift(x)), shift(x), x], -1)`.

    Each shift goes one token further back than the one it reads, so that w - 1 tokens are remembered in all.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found = 0
        for node in graph.nodes(aten.unfold.default):
            window = _window(graph, node)
            if window is not None:
                found += 1
                node.replace_all_uses_with(_emit(graph, *window, node))
        return TransformResult(found=found, rewritten=found)


def _window(graph: ModelGraph, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Source, its dimension of tokens and the window's size, if that is what is unfolded."""
    arguments: list[Any] = list(node.args)
    padded, dim, size, step = arguments
    while padded.target == aten.slice.Tensor and _shape(padded) == _shape(padded.args[0]):
        padded = padded.args[0]
    padding = pad_of_zeros(padded) if padded.target in _PADS else None
    if padding is None or step != 1:
        return None
    source, padded_dim, before, after = padding
    rank = source.meta["val"].dim()
    fits = padded_dim == dim % rank and (before, after) == (size - 1, 0) and dim % rank != 0
    return (source, padded_dim, size) if fits and is_num_tokens(graph, source.meta["val"].shape[padded_dim]) else None


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _emit(graph: ModelGraph, source: fx.Node, dim: int, size: int, node: fx.Node) -> fx.Node:
    """The windows in the layout of `unfold`: oldest token first, in a dimension of their own at the end."""
    shifted = source if dim == 1 else graph.call(aten.transpose.int, source, 1, dim, before=node)
    columns = [source]
    for _ in range(size - 1):
        shifted = graph.call(token_shift, shifted, 1, None, None, before=node)
        column = shifted if dim == 1 else graph.call(aten.transpose.int, shifted, 1, dim, before=node)
        columns.insert(0, column)
    return graph.call(aten.stack.default, columns, -1, before=node)
